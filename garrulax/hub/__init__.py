"""Floor 4: models as files. Reads and writes Hugging Face folders: config.json, safetensors, tokenizer."""

from garrulax.hub.model import Model
from garrulax.hub.reading import load, load_config
from garrulax.hub.writing import save

__all__ = ["Model", "load", "load_config", "save"]
