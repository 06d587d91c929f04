"""A second copy of the small files that a run cannot go on without: run.json and the tokenizer."""

import shutil
from pathlib import Path

from garrulax.core.disk import sync
from garrulax.train import digests
from garrulax.train.checkpoint import saved_steps
from garrulax.train.digests import DamagedError
from garrulax.train.settings import RUN_FILE

NAME = "spare"
#: Folder of the tokenizer in the folder of a run.
TOKENIZER = "tokenizer"


def keep(folder: Path) -> None:
    """Copies run.json and the tokenizer of a run to `spare`, with digests, if they are not there already."""
    names = [str(p.relative_to(folder)) for p in (folder / RUN_FILE, *(folder / TOKENIZER).rglob("*")) if p.is_file()]
    wanted = dict(zip(names, digests.of_files(folder, names), strict=True))
    spare, temporary = folder / NAME, folder / f".{NAME}.writing"
    if _whole_copy(spare) == wanted:
        return
    shutil.rmtree(temporary, ignore_errors=True)
    for name in names:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, temporary / name)
    digests.write(temporary)
    shutil.rmtree(spare, ignore_errors=True)
    temporary.rename(spare)
    sync(folder)


def mend(folder: Path) -> list[str]:
    """Puts back files of a run that are damaged or missing, from the spare copy or, for run.json, a checkpoint.

    Args:
        folder: Of a run that is resumed.

    Returns:
        A line for every file that was put back.

    Raises:
        DamagedError: If run.json is damaged and there is no other copy.
    """
    for left in folder.glob(".*.writing"):  # by a process that died while it wrote a file
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    lines, copies = [], _whole_copy(folder / NAME) or {}
    for name, digest in copies.items():
        if digests.of_files(folder, [name]) == [digest] or (name == RUN_FILE and _damage(folder) is None):
            continue  # a run.json that is whole may be newer than the copy
        temporary = folder / f".{Path(name).name}.writing"
        shutil.copyfile(folder / NAME / name, temporary)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(folder / name)
        lines.append(f"{folder / name} was damaged or missing: put back from {folder / NAME}")
    damage = _damage(folder)
    if damage is None:
        return lines
    for step in reversed(saved_steps(folder / "checkpoints")):
        try:
            identity = digests.read(folder / "checkpoints" / str(step))["identity"]
        except DamagedError:
            continue
        digests.write_durably(folder / RUN_FILE, digests.sealed(identity))
        return [*lines, f"{damage}: the settings are those in the checkpoint of step {step}"]
    if (folder / RUN_FILE).exists():
        raise DamagedError(f"{damage}, and there is no other copy of it: remove {folder} and start the run again")
    return lines


def _damage(folder: Path) -> str | None:
    """Describes the damage to the run.json of a run; None if it is whole."""
    try:
        digests.read_sealed(folder / RUN_FILE)
    except DamagedError as error:
        return str(error)
    return None


def _whole_copy(spare: Path) -> dict[str, str] | None:
    """The digests of the files in the spare copy; None if it is damaged or missing."""
    try:
        digests.check(spare)
        return digests.read(spare)["files"]
    except DamagedError:
        return None
