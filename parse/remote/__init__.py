"""Models on a vLLM server, as rounds know them."""


def is_address(name: object) -> bool:
    """Whether a model's name is a server's address."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))
