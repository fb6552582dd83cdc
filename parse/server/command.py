"""python -m parse serve --run runs/quickstart: answer clients of OpenAI's interface over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from parse.options import Parser, add_models, add_settings, count, message_of, quieten
from parse.sources import load
from parse.threads import in_thread

KEY = "PARSE_API_KEY"  # the environment variable that may hold the key, so that no list of processes shows it


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, which let finish what runs; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    try:
        import uvicorn
    except ImportError:
        print("error: the server needs more packages: pip install 'parse-engine[serve]'", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            quieten()
            app = in_thread(lambda: _application(given))  # what computes from then on is the worker's thread alone
    except Exception as error:
        if (message := message_of(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2

    class Stopping(uvicorn.Server):
        """Says that it is about to stop from the signal on, and not when all have left."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.serving.closing = True
            super().handle_exit(sig, frame)

    host, port = given.get("host", "127.0.0.1"), given.get("port", 8000)
    _log()
    print(f"serving {app.state.serving.name} at http://{host}:{port}/v1", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once all is finished
        wait = int(app.state.serving.limits.seconds) + 1  # once it is told to stop, for clients that do not read
        options: dict[str, Any] = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": wait}
        options["http"] = "h11"  # which limits how long a request's head may be
        Stopping(uvicorn.Config(app, host=host, port=port, **options)).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    """The command line; what is not given is not in its outcome."""
    parser = Parser(
        "python -m parse serve", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add_models(parser)
    add_settings(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", help="the address to listen at; default: 127.0.0.1, which only this machine reaches")
    server.add_argument("--port", type=count, help="default: 8000")
    server.add_argument("--name", help="what clients call the model; default: the name of the run or of the target")
    server.add_argument("--api-key", help=f"what clients must send; default: ${KEY}, or none")
    server.add_argument("--at-once", type=count, help="answers that are written at a time; default: 16")
    server.add_argument("--queue", type=count, help="answers that may wait; more are refused with status 429")
    server.add_argument("--max-body", dest="body", type=count, help="bytes of a request; more: 413")
    server.add_argument("--max-prompt", dest="prompt", type=count, help="tokens of a prompt; more: 400")
    server.add_argument("--max-n", dest="n", type=count, help="choices of a prompt; more: 422")
    server.add_argument("--timeout", dest="seconds", type=count, help="seconds of a request; more: 504")
    server.add_argument("--log-texts", action="store_true", help="write prompts and answers into the log too")
    return parser


def _application(given: dict[str, Any]) -> Any:
    """The application over the loaded engine, its passes compiled where that is asked for."""
    key = given.get("api_key", os.environ.get(KEY))
    if key == "":
        raise ValueError(f"the API key is empty (--api-key, or ${KEY}): give one, or leave it out to let in everybody")
    engine, settings, verifier = load(given)

    from parse.server.app import create_app
    from parse.server.metrics import expected_of
    from parse.server.serving import Limits, Serving

    names = Limits.__dataclass_fields__.keys()
    limits = Limits(**{name: given[name] for name in names & given.keys()})
    if given.get("compile"):
        engine.warm_up(limits.at_once)
    named = Path(str(given.get("run") or engine.models["target"].name.rpartition("#")[2]))
    name = given.get("name") or named.name or named.resolve().name
    as_calibrated = not {"threshold", "policy", "horizon", "handback", "temperature", "method"} & given.keys()
    serving = Serving(engine, name, settings, limits, expected_of(verifier) if as_calibrated else None)
    return create_app(serving, key, given.get("log_texts", False))


class JsonLines(logging.Formatter):
    """A line of JSON for each record, whose message is text or a dictionary of fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        head = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname, "from": record.name}
        return json.dumps({**head, **fields}, ensure_ascii=False)


def _log() -> None:
    """Lines of JSON on standard error: one for each request, and what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("parse.server").setLevel(logging.INFO)
