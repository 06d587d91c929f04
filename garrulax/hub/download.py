"""From a name on the Hugging Face hub to a folder."""

import re
from pathlib import Path

#: What a model needs; everything else in a repository (other frameworks' weights, pictures) stays there.
FILES = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "chat_template.jinja")
#: Of those: what lies in folders of its own (other formats), and the weights once more in Mistral's own names.
LEFT_OUT = ("*/*", "consolidated*")


def find(path: str | Path) -> Path:
    """The folder `path`, or a download of it where it is no folder but looks like `organisation/name`.

    Raises FileNotFoundError, saying what to do, and ValueError for a path that is a file.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file: give the folder that holds config.json and the safetensors")
    if not isinstance(path, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        raise FileNotFoundError(f"there is no folder {path}")
    return _download(path)


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no folder {name}; to fetch it from the Hugging Face hub: pip install 'garrulax[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=list(LEFT_OUT)))
    except Exception as error:  # the library raises a dozen unrelated types: no network, no such name, no access
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"there is no folder {name}, and the Hugging Face hub gave none: {reason}; without a network, run `hf "
            f"download {name}` where there is one and give the folder"
        ) from error
