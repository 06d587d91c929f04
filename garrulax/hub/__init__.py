"""Floor 4: models as files. Reads and writes Hugging Face folders: config.json, safetensors, tokenizer."""

from garrulax.hub.model import Model
from garrulax.hub.reading import load
from garrulax.hub.writing import save

__all__ = ["Model", "load", "save"]
