"""Finds the folder or GGUF file of a model; downloads a folder from the Hugging Face hub if needed."""

import re
from pathlib import Path

from garrulax.hub.files import is_there
from garrulax.hub.gguf import find_gguf, is_gguf

#: Files that a model needs. Other files of a repository, such as weights for other frameworks, are not downloaded.
FILES = (
    "*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
#: Files that match `FILES` but are not needed: other formats in sub-folders (all those whose name does not begin as
#: that of the templates), and a second copy of Mistral's weights.
LEFT_OUT = ("[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*")


def find_folder(path: str | Path) -> Path:
    """The local folder or GGUF file `path`, or a download of it if there is none and it looks like `organisation/name`.

    Of a folder without config.json that holds one GGUF file, that file.

    Raises:
        FileNotFoundError: There is no such folder, and the hub did not give it, or it is a link to nothing; the message
            says what to do.
        ValueError: `path` is another file, or a folder with several GGUF files.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return find_gguf(folder) or folder
    if is_gguf(folder):
        return folder
    if is_there(folder):
        raise ValueError(
            f"{path} is a file: give the folder that holds config.json and the safetensors, or a file in GGUF format"
        )
    if not isinstance(path, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        raise FileNotFoundError(f"there is no folder {path}")
    return _download(path)


def _download(name: str) -> Path:
    # A mistyped path is likelier than a name on the hub, so the messages mention the folder first.
    no_folder = f"there is no folder {name}: check the path. If it is the name of a model on the Hugging Face hub"
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(f"{no_folder}, first pip install 'garrulax[hub]'") from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=list(LEFT_OUT)))
    except Exception as error:  # the library raises many unrelated types: no network, no such name, no access
        reason = str(error).strip().split("\n")[0].removeprefix("Got: ").rstrip(".") or type(error).__name__
        raise FileNotFoundError(
            f"{no_folder}, the hub did not give it: {reason}. Without a network, run `hf download {name}` where there "
            "is one and give the folder"
        ) from error
