"""Files from strangers: whatever is wrong with one, a clear error in one line, soon, and without much memory."""

import copy
import json
import random
import re
import shutil
import signal
import tracemalloc

import made
import pytest
from oracle import CAUSAL
from test_hub import folder_of

import garrulax as gx
from garrulax.hub.tokenizers import ByteTokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

SECONDS = 20  # for one file, on a busy machine
NUMBERS = ("0", "-1", "1", "3", "255", "65537", str(2**31), str(2**63), str(2**64 - 1), "1000000000000", "9" * 400,
           "9" * 5000, "1e400", "-1e-9", "0.5", "NaN", "Infinity")  # fmt: skip
VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "\n",
    [],
    [[]],
    [1],
    {},
    {"a": 1},
    {"rope_type": 5},
    0,
    -1,
    1.5,
    7,
    10**12,
    10**30,
)


# -- Mutations --------------------------------------------------------------------------------------------------------


def damaged(content, rng):
    """Bytes with one to three things wrong."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice((_flip, _cut, _splice, _insert, _length, _number))(bytearray(content), rng)
    return bytes(content)


def _flip(content, rng):
    for _ in range(rng.randint(1, 8)):
        if content:
            content[_near_start(content, rng)] ^= 1 << rng.randrange(8)
    return content


def _near_start(content, rng):
    return min(len(content) - 1, int(rng.expovariate(1 / 800)) if rng.random() < 0.7 else rng.randrange(len(content)))


def _cut(content, rng):
    return content[: rng.randint(0, len(content))] if rng.random() < 0.5 else content[rng.randint(0, 40) :]


def _splice(content, rng):
    start, to, length = rng.randint(0, len(content)), rng.randint(0, len(content)), rng.randint(0, 200)
    content[to : to + rng.choice((0, length))] = content[start : start + length]
    return content


def _insert(content, rng):
    pieces = (b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b"\0", b'"', b"}", rng.randbytes(9), "\N{SNOWMAN}".encode())
    at = _near_start(content, rng) if content else 0
    content[at:at] = rng.choice(pieces)
    return content


def _length(content, rng):
    """The length of a safetensors header."""
    n = int.from_bytes(content[:8], "little")
    n = rng.choice((0, 1, 7, n - 1, n + 1, n + 8, n // 2, len(content), len(content) - 8, 2**31, 2**63, 2**64 - 1))
    content[:8] = (max(n, 0) % 2**64).to_bytes(8, "little")
    return content


def _number(content, rng):
    """One of the first numbers of a JSON text."""
    found = list(re.finditer(rb"\d+(\.\d+)?", bytes(content[:20_000])))
    if found:
        span = rng.choice(found).span()
        content[slice(*span)] = rng.choice(NUMBERS).encode()
    return content


def twisted(value, rng):
    """A parsed JSON object with one to three values changed, keys dropped, renamed, or given to others."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            how = rng.random()
            if how < 0.1:
                del place[key]
            elif how < 0.2 and isinstance(place, dict):
                place[str(key) + rng.choice(("s", "_", "\n"))] = place.pop(key)
            elif how < 0.4:
                place[key] = copy.deepcopy(place[rng.choice(keys)])
            elif how < 0.6 and isinstance(place[key], int):
                place[key] += rng.choice((-1, 1, -7, 10**6))
            else:
                place[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return value


# -- The harness ------------------------------------------------------------------------------------------------------


def survives(load, folder):
    """Whether `load` succeeds; it may fail with a clear error alone, in time, and in memory that the files justify."""
    size = sum(file.stat().st_size for file in folder.iterdir())

    def late(*_):
        raise AssertionError(f"{SECONDS} s are over")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        load(folder)
        return True
    except (ValueError, FileNotFoundError) as error:
        lines = str(error).splitlines()
        if len(lines) != 1 or len(lines[0]) > 2000:
            raise AssertionError(f"not one short line: {str(error)[:3000]!r}") from error
        return False
    finally:
        signal.alarm(0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000 + 20 * size, f"{peak:,} bytes for files of {size:,}"


@pytest.fixture(params=[40, pytest.param(1000, marks=pytest.mark.slow)])
def times(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    """What JAX allocates once does not count."""
    gx.load(folder_of("llama_gqa", tmp_path_factory.mktemp("warm") / "m"))


def assert_all_survive(load, folder, file, times, original, change):
    """Damages `file` in `times` ways; some loads must fail and, for files with slack, some succeed."""
    outcomes = []
    for seed in range(times):
        rng = random.Random(f"{file}{seed}")
        content = change(original, rng)
        (folder / file).write_bytes(content)
        try:
            outcomes.append(survives(load, folder))
        except BaseException as error:
            raise AssertionError(f"seed {seed} of {file}: {type(error).__name__}: {str(error)[:500]}") from error
    assert not all(outcomes)


# -- Readers ----------------------------------------------------------------------------------------------------------


def test_safetensors(times, tmp_path):
    folder = folder_of("llama_gqa", tmp_path / "m")
    original = (folder / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")

    def change(content, rng):
        if rng.random() < 0.5:
            return damaged(content, rng)
        header = json.dumps(twisted(json.loads(content[8:length]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + content[length:]

    assert_all_survive(gx.load, folder, "model.safetensors", times, original, change)


def test_index(times, tmp_path):
    model = gx.load(folder_of("llama_gqa", tmp_path / "reference"))
    gx.save(model, tmp_path / "m", max_shard_size=30_000)
    original = (tmp_path / "m" / "model.safetensors.index.json").read_bytes()
    assert_all_survive(gx.load, tmp_path / "m", "model.safetensors.index.json", times, original, damaged_json)


def damaged_json(content, rng):
    return damaged(content, rng) if rng.random() < 0.4 else json.dumps(twisted(json.loads(content), rng)).encode()


def test_config(times, tmp_path):
    cases = [*CAUSAL, "glm_original"] if times > 100 else ["gpt2", "llama_gqa", "chatglm2", "falcon7b", "glm_original"]
    share = max(6, -(-times // len(cases)))  # so many that at least one is refused
    for case in cases:
        folder = folder_of(case, tmp_path / case)
        assert_all_survive(gx.load, folder, "config.json", share, (folder / "config.json").read_bytes(), damaged_json)
        shutil.rmtree(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(file, times, tmp_path):
    ByteTokenizer().save(tmp_path)
    assert_all_survive(load_tokenizer, tmp_path, file, times, (tmp_path / file).read_bytes(), damaged_json)


@pytest.mark.parametrize("kind", ["SentencePiece", "tiktoken"])
def test_model_files_of_tokenizers(kind, times, tmp_path):
    """Only Python's own memory is counted, not that of the libraries."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    original = made.pieces() if kind == "SentencePiece" else made.ranks(made.trained_ranks())
    assert_all_survive(load_tokenizer, tmp_path, "tokenizer.model", times, original, damaged)


def test_tokenizer_files_without_end(tmp_path):
    ByteTokenizer().save(tmp_path)
    for file in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / file).write_text('{"version": ' + "[" * 100_000)
        assert not survives(load_tokenizer, tmp_path)
