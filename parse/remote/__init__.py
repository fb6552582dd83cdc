"""Models on a vLLM server, as rounds know them."""
