"""What must not be written down: passwords and tokens in recipes, command lines and addresses."""

from __future__ import annotations

import re
from typing import Any

KINDS = "hub|hf|access|auth|api|bearer|wandb|openai|x-api"
# but neither eos_token nor key_variable
NAME = rf"(?:(?:[a-z]+[_-])*(?:{KINDS})[_-]?)?(?:token|key)|\w*(?:secret|password|passphrase)\w*|passwd|pwd|credentials"
KEY = re.compile(rf"(?:^|\.|--)(?:{NAME})$", re.IGNORECASE)
INSIDE = re.compile(rf"""(?<![\w.])(["']?(?:{NAME})["']?\s*:\s*)[^,}}]+""", re.IGNORECASE)  # in the YAML of an override
# of the services' own forms: long, and without the other characters of a path
VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-(?=[\w-]*\d)[\w-]{20,}|\bghp_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{20,}|\bxox[abp]-[\w-]{10,}|\bAKIA[A-Z0-9]{16}|\bAIza[\w-]{30,}|(?<=Bearer )\S+"
)
IN_ADDRESS = re.compile(
    rf"(?<=://)[^/\s]*@|(?<=[?&])({NAME})=[^&\s]+", re.IGNORECASE
)  # a name and a password, or a key


def without_secrets(content: Any) -> Any:
    """Plain data with what looks like a password or a token blotted out, by its key or by its own look."""
    if isinstance(content, dict):
        return {k: "[redacted]" if v and KEY.search(str(k)) else without_secrets(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [without_secrets(item) for item in content]
    if not isinstance(content, str):
        return content
    key, equals, _ = content.partition("=")
    if equals and KEY.search(key):
        return f"{key}=[redacted]"
    if equals:
        content = INSIDE.sub(r"\1[redacted]", content)
    blotted = lambda found: f"{found[1]}=[redacted]" if found[1] else "[redacted]@"
    return IN_ADDRESS.sub(blotted, VALUE.sub("[redacted]", content))
