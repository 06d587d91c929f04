"""Layer 4: reads and writes models as Hugging Face folders (config.json, safetensors, tokenizer files)."""

from garrulax.hub.medusa import load_medusa, save_medusa
from garrulax.hub.model import Model
from garrulax.hub.reading import load, load_config
from garrulax.hub.writing import save

__all__ = ["Model", "load", "load_config", "load_medusa", "save", "save_medusa"]
