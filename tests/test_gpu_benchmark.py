"""`benchmarks/gpu.py`: its processes, its file of results, how it reads traces; and its first part with tiny sizes."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from accelerator import attention_cases, decode, decode_attention, results, trace, workers  # noqa: E402

CHILD = """
import json, os, sys, time
name, mode = sys.argv[1:]
print("from a library", flush=True)
if mode == "turns":
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
for i in range(3):
    print(json.dumps({"table": "t", "name": f"{name}{i}", "text": "", "at": time.monotonic()}), flush=True)
    time.sleep(0.02)
if name == "bad":
    raise SystemExit("it has no memory")
if name == "long":
    time.sleep(60)
if name == "silent":
    os.close(1)
    time.sleep(60)
if name == "short":
    print(json.dumps({"planned": 4}), flush=True)
if name == "broken":
    print('{"table": "t"{"table": "t"', flush=True)
"""


def child(name, mode):
    return workers.Worker([sys.executable, "-c", CHILD, name, mode])


def test_workers_measure_in_turns_and_failures_are_told():
    rows = []
    wrong = workers.run([child(name, "turns") for name in ("a", "bad", "c")], rows.append, 60)
    assert [row["name"] for row in rows] == [f"{name}{i}" for name in ("a", "bad", "c") for i in range(3)]
    assert len(wrong) == 1
    assert "it has no memory" in wrong[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("silent", "said no more, and was ended 2 s later"),
        ("short", "reported 3 of 4 rows"),
        ("broken", "reported what is no row"),
    ],
)
def test_lost_rows_and_processes_that_do_not_end_are_told(name, said):
    start = time.monotonic()
    (wrong,) = workers.run([child(name, "free")], lambda row: None, 2 if name == "silent" else 60, turns=False)
    assert said in wrong
    assert time.monotonic() - start < 30


STRESS = """
import threading
from accelerator.workers import emit
def report():
    for _ in range(2000):
        emit("check", "name", "x" * 150)
threads = [threading.Thread(target=report) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_rows_of_several_threads_do_not_mix():
    rows = []
    stress = workers.Worker([sys.executable, "-c", STRESS], {"PYTHONPATH": str(ROOT / "benchmarks")})
    assert workers.run([stress], rows.append, 60, turns=False) == []
    assert len(rows) == 8000


def test_no_two_checks_have_one_name():
    names = [f"{case.name} {dtype}" for case in attention_cases.CASES for dtype in case.dtypes]
    names += [case.name for case in decode_attention.CASES]
    assert len(set(names)) == len(names)


def test_a_worker_that_takes_too_long_is_ended_and_its_rows_are_kept(tmp_path):
    path = tmp_path / "results.json"
    found = results.Results(path, "a GPU")
    wrong = workers.run([child("long", "free")], lambda row: found.add("train", row), 3, turns=False)
    assert "was ended after 3 s" in wrong[0]
    assert set(json.loads(path.read_text())[found.title]["train"]["tables"]["t"]) == {"long0", "long1", "long2"}
    again = results.Results(path, "a GPU")
    again.add("train", {"table": "t", "name": "another", "text": ""})
    assert len(results.Results(path, "a GPU").table("train", "t")) == 4


def test_results_of_another_device_are_kept(tmp_path):
    path = tmp_path / "results.json"
    for device, ms in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        results.Results(path, device).add("train", {"table": "train", "name": device, "text": "", "ms": ms})
    rows = {device: results.Results(path, device).table("train", "train") for device in ("one", "two")}
    assert {name: row["ms"] for table in rows.values() for name, row in table.items()} == {"one": 3.0, "two": 2.0}


def test_an_error_stands_beside_the_last_measurement_until_the_next(tmp_path):
    found = results.Results(tmp_path / "results.json", "a GPU")
    good = {"table": "decode", "name": "7b", "text": "", "ms": 1.0, "tokens_per_s": 1.0, "first_call_s": 1.0}
    bad = {"table": "decode", "name": "7b", "text": "", "error": "no memory"}
    for row in (good, bad, {**bad, "table": "first call"}):
        found.add("decode", row)
    assert found.table("decode", "decode")["7b"]["ms"] == 1.0
    text = "\n".join(results.summary(found))
    assert text.count("no memory") == 2
    found.add("decode", good)
    assert list(found.table("decode", "decode")) == ["7b"]


def test_models_of_decoding_are_made_a_layer_at_a_time_and_every_failure_is_a_row(monkeypatch, capfd):
    asked, real = [], decode.gx.init
    monkeypatch.setattr(decode.gx, "init", lambda config, *a, **k: asked.append(config.layers) or real(config, *a, **k))
    params, config = decode.model("bfloat16", tiny=True)
    assert asked == [1]
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(params["blocks"])]
    assert len(set(places)) == len(places) == config.layers * len(jax.tree.leaves(params["blocks"][0]))

    def fails(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(decode, "wait_for_turn", lambda: None)
    for name, words in (("generate", ["--only-first"]), ("init", [])):
        monkeypatch.setattr(decode.gx, name, fails)
        monkeypatch.setattr(sys, "argv", ["decode", "bfloat16", "--tiny", *words])
        decode.main()
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(row["table"], row["name"]) for row in rows] == [
        ("first call", "tiny B1 bfloat16"),
        ("decode", "tiny bfloat16"),
    ]
    assert all("no memory" in row["error"] for row in rows)


def test_without_a_gpu_nothing_is_measured_and_nothing_is_written(tmp_path):
    out = tmp_path / "results.json"
    done = gpu("--part", "train", "--out", str(out), JAX_PLATFORMS="cpu")
    assert done.returncode == 1
    assert "NoGPU: jax" in done.stderr
    assert "GPU_PYTHON=" in done.stderr
    assert not out.exists()


HLO = """HloModule jit_step

FileNames
1 "/home/garrulax/train/objectives.py"
2 "/home/garrulax/layers/stack.py"
3 "/home/garrulax/kernels/cudnn.py"
4 "/home/optax/transform.py"

FunctionNames
1 "causal_lm"
2 "scan_layers"
3 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=4 function_name_id=3 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=1}

%fused_mul (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %mul.1 = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(step)/jvp()/while/body/mul" stack_frame_id=2}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %custom-call.3 = f32[4]{0} custom-call(%p), metadata={op_name="jit(step)/jvp()/dot_general" stack_frame_id=1}
  %exp.1 = f32[4]{0} exponential(%p), metadata={op_name="jit(step)/jvp()/exp" stack_frame_id=1}
  %call.9 = f32[4]{0} custom-call(%p), metadata={op_name="jit(step)/jvp()/while/body/call" stack_frame_id=3}
  %slice.2 = f32[4]{0} slice(%p), metadata={op_name="jit(step)/jvp()/while/body/dynamic_slice" stack_frame_id=2}
  %sqrt.1 = f32[4]{0} sqrt(%p), metadata={op_name="jit(step)/sqrt" stack_frame_id=4}
  ROOT %loop_multiply_fusion = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused_mul
}
"""


def test_kernels_of_a_trace_are_counted_by_part_of_the_step():
    ops = {
        "custom-call.3": ("nvjet_sm90_tst", "products"),
        "exp.1": ("loop_exp_fusion", "loss"),
        "call.9": ("mosaic", "attention"),
        "slice.2": ("loop_slice", "copies"),
        "sqrt.1": ("sqrt", "optimizer"),
        "loop_multiply_fusion": ("loop_multiply_fusion", "elementwise"),
        "unknown.1": ("kernel", "other"),
    }
    found = [trace.Kernel(1.0, 1, op, kernel) for op, (kernel, _) in ops.items()]
    places = trace.origins(HLO)
    assert [trace.part_of(k, places.get(k.op)) for k in found] == [part for _, part in ops.values()]
    assert trace.by_part(found, HLO) == dict.fromkeys(trace.PARTS, 1.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--part", "decode", "--only", "speed"), "the part decode has the steps plain, again, quantised, torch"),
        (("--torch-python", "/no/python"), "there is no such program"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(words, said):
    done = gpu(*words)
    assert done.returncode == 2
    assert said in done.stderr


def gpu(*words, **environment):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("wrapped_slice", "copies"),
        ("wrapped_dynamic_update_slice", "copies"),
        ("wrapped_transpose", "copies"),
        ("wrapped_add", "elementwise"),
        ("wrapped_tanh", "elementwise"),
    ],
)
def test_of_kernels_of_one_operation_only_those_that_move_are_copies(kernel, part):
    layer = trace.Origin(
        "jit(step)/jvp()/while/body/x", ("garrulax/layers/stack.py:f", "garrulax/train/objectives.py:g")
    )
    assert trace.part_of(trace.Kernel(1.0, 1, "fusion.1", kernel), layer) == part


@pytest.mark.slow
def test_the_tiny_first_part_runs(tmp_path):
    out = tmp_path / "results.json"
    done = gpu("--tiny", "--part", "attention", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text()).values()
    tables = found["attention"]["tables"]
    assert {"ok"} <= {row["verdict"] for row in tables["check"].values()} <= {"ok", "refused"}
    assert {row["case"] for row in tables["speed"].values()} == {"full", "causal", "window", "packed", "alibi"}
    assert tables["decode kernel"]
