"""What single fields of a recipe may hold: numbers in a range, and texts of some form."""

from __future__ import annotations

from typing import Annotated

from recipes.strict import Range, Text

Count = Annotated[int, Range(1, 10**9)]
Whole = Annotated[int, Range(0, 10**9)]
Layers = Annotated[int, Range(1, 10**4)]
Threads = Annotated[int, Range(1, 1024)]
Rate = Annotated[float, Range(1e-12, 1)]  # a learning rate
Minutes = Annotated[float, Range(0.001, 10**5)]

Words = Annotated[str, Text(r"(?s)(?=.*\S).*", "text that is not blank, or leave the key out")]
Source = Annotated[  # a model, a task or a folder
    str,
    Text(
        r"(?=.*\S)(?!.{1001})[^/\x00-\x1f\x7f]{0,255}(/[^/\x00-\x1f\x7f]{0,255})*",
        "a path or a name, up to 1000 printable characters and no more than 255 between slashes",
    ),
]
Name = Annotated[  # of a folder
    str,
    Text(
        r"(?=[\x00-\x7f]*$|.{1,60}$)\w([\w .+-]{0,98}\w)?",
        "1 to 100 letters, digits, spaces and _ . + -, a letter or a digit first and last (60 if not all are ASCII)",
    ),
]
Url = Annotated[str, Text(r"https?://[^\s/]\S{0,999}", "an address such as http://localhost:8000/v1")]
Variable = Annotated[str, Text(r"[A-Za-z_][A-Za-z0-9_]{0,99}", "the name of an environment variable")]
Label = Annotated[str, Text(r"(?=.*\S)[^\x00-\x1f\x7f]{1,128}", "1 to 128 printable characters")]
Project = Annotated[  # of Weights & Biases
    str, Text(r"(?=.*\S)[^/\\#?%:\x00-\x1f\x7f]{1,128}", "1 to 128 printable characters without / \\ # ? % :")
]

CHECKS = ("contains", "equal", "number", "math")
Check = Annotated[
    str,
    Text(
        rf"{'|'.join(CHECKS)}|(?=.{{3,200}}$)[A-Za-z_][\w.]*:[A-Za-z_]\w*",
        f"{', '.join(CHECKS)}, or a function of your own as module:function (see `eval.tasks.user_checker`)",
    ),
]
