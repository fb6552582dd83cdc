"""An OpenAI-compatible server over an engine: `python -m parse serve`."""
