"Several processes say what one would; a launch, a signal and SLURM's environment are understood, and mistakes are told."
import json, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest, torch
from mbd import devices
from mbd.devices import accelerator, broadcast, everyone, from_slurm, gather, gather_rows, launch, main_first, processes, seeded, total, wait, Stopping

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="the tests start their own processes")


# --- one process

def test_one_process_is_the_main_one_and_hears_itself():
    assert processes() == (0, 1)
    assert gather({"a": (1, None)}) == [{"a": [1, None]}] and broadcast("x") == "x" and everyone(1) and not everyone(0)
    values = torch.tensor([1., 2.], requires_grad=True)
    summed = total(values)
    summed += 1
    assert values.tolist() == [1, 2] and not summed.requires_grad and not gather_rows(values).requires_grad
    wait()


@pytest.mark.parametrize("tensor", [torch.tensor(3), torch.zeros(0, 4), torch.tensor([True, False]), torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), torch.arange(6.).reshape(2, 3).T, torch.tensor([2 ** 60 + 1])])
def test_tensors_survive_the_way_bit_for_bit(tensor):
    back, = gather(tensor)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape and back.tolist().__repr__() == tensor.tolist().__repr__()


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="JSON values, not Path|JSON values, not PosixPath|JSON values, not WindowsPath"): gather(Path("x"))


def test_main_first_passes_errors_on_and_leaves_nothing_open():
    with pytest.raises(KeyError):
        with main_first(): raise KeyError("x")
    with main_first(): pass


def test_accelerator_can_be_asked_again():
    threads = torch.get_num_threads()
    for precision, word in [("float32", "no"), ("bfloat16", "bf16"), ("float32", "no")]:
        made = accelerator("cpu", precision, 3)
        assert (made.device.type, made.mixed_precision, made.gradient_accumulation_steps, made.num_processes) == ("cpu", word, 3, 1)
    layer = accelerator("cpu").prepare(torch.nn.Linear(2, 2).double())
    assert layer(torch.ones(1, 2).double()).dtype == torch.float64 and torch.get_num_threads() == threads and "ACCELERATE_TORCH_DEVICE" not in os.environ


@pytest.mark.parametrize("asked, message", [(dict(precision="float16"), "use bfloat16 or float32"), (dict(precision="bf16"), "did you mean 'bfloat16'|valid: float32"),
                                            (dict(accumulate=0), "accumulate must be"), (dict(device="cuda:77"), "cuda:77"), (dict(device="gpu"), "valid: auto")])
def test_accelerator_refuses(asked, message):
    with pytest.raises(ValueError, match=message): accelerator(**asked)


def test_a_launch_keeps_to_one_kind_of_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="use 'cuda'"): devices._check("cuda:1", "float32", 1, world=2)
    assert devices._check("cuda:1", "float16", 1, world=1) == torch.device("cuda:1")
    monkeypatch.setattr(devices.dist, "is_initialized", lambda: True); monkeypatch.setattr(devices.dist, "get_backend", lambda: "gloo")
    with pytest.raises(ValueError, match="one launch keeps to one kind"): devices._check("cuda", "float32", 1, world=2)


def test_seeded_draws_again_and_leaves_the_caller_alone():
    def draw(*seed):
        with seeded(*seed): return torch.rand(3).tolist()
    torch.manual_seed(1); expected = torch.rand(2).tolist(); torch.manual_seed(1)
    assert draw(0, 1, 0) == draw(0, 1, 0)
    assert len({tuple(draw(*s)) for s in [(0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 1)]}) == 4
    with pytest.raises(ZeroDivisionError):
        with seeded(5): torch.rand(1); 1 / 0
    assert torch.rand(2).tolist() == expected


# --- signals

@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_and_the_old_handler_comes_back(name):
    if not hasattr(signal, name): pytest.skip(f"no {name} on this system")
    number, seen = getattr(signal, name), []
    before = signal.signal(number, lambda *_: seen.append(1))
    try:
        with Stopping() as stopping:
            assert not stopping.asked and not stopping.agreed()
            with Stopping() as inner:
                with Stopping() as innermost:      # a run, a training in it, a prediction in that
                    signal.raise_signal(number)
                    assert innermost.asked
                assert inner.asked
            assert stopping.asked and stopping.agreed() and not seen
            with Stopping() as later: assert later.asked
        signal.raise_signal(number)
        assert seen == [1]
    finally: signal.signal(number, before)


def test_stopping_in_another_thread_touches_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []
    def work():
        with Stopping() as stopping: found.append((stopping.asked, signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=work); thread.start(); thread.join()
    assert found == [(False, before)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_still_dies_of_sigterm_and_ignores_sigusr1():
    with Stopping() as stopping:
        child = os.fork()
        if not child: time.sleep(60); os._exit(0)
        os.kill(child, signal.SIGUSR1); time.sleep(.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM and not stopping.asked


# --- SLURM

TASK = dict(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_NODEID="1", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="8", SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_STEP_NODELIST="gpu[03-04]", SLURM_JOB_ID="123456", SLURM_STEP_ID="0")
TOLD = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="gpu03", MASTER_PORT="23456")


def without(*names, **more): return {**{n: v for n, v in TASK.items() if n not in names}, **more}


@pytest.mark.parametrize("environ, expected", [
    (TASK, TOLD),
    (without("SLURM_STEP_TASKS_PER_NODE", SLURM_NTASKS_PER_NODE="4"), TOLD),
    (without("SLURM_STEP_NODELIST", SLURM_JOB_NODELIST="gpu[03-04]"), TOLD),
    (without("SLURM_NODEID"), TOLD),
    (without(SLURM_STEP_TASKS_PER_NODE="3,5", SLURM_LOCALID="4"), {**TOLD, "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "5"}),
    (without(MASTER_ADDR="10.0.0.1", MASTER_PORT="4"), {n: v for n, v in TOLD.items() if not n.startswith("MASTER")}),
    (without(WORLD_SIZE="8"), {n: v for n, v in TOLD.items() if n != "WORLD_SIZE"}),
    ({}, {}), (without(RANK="0"), {}), (without("SLURM_PROCID"), {}),
    (dict(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1"), {}),      # a shell inside a larger allocation
    (dict(SLURM_PROCID="0", SLURM_NTASKS="1"), {}),
])
def test_from_slurm(environ, expected):
    kept = dict(environ)
    assert from_slurm(environ) == expected and environ == kept


@pytest.mark.parametrize("environ, message", [
    (dict(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="1", SLURM_JOB_NODELIST="a[1-2]"), "write srun before"),
    (without(SLURM_PROCID="8"), "do not fit"), (without(SLURM_LOCALID="4"), "do not fit"), (without(SLURM_NODEID="2"), "do not fit"),
    (without(SLURM_STEP_TASKS_PER_NODE="4"), "makes 4 tasks, but there are 8"), (without(SLURM_STEP_TASKS_PER_NODE="4(2)"), "cannot be read"),
    (without(SLURM_STEP_NODELIST="gpu03"), "names 1 nodes"), (without("SLURM_STEP_NODELIST"), "node list ''"), (without(SLURM_STEP_NODELIST="gpu[a-b]"), "cannot be read"),
    (without("SLURM_NODEID", SLURM_STEP_TASKS_PER_NODE="3,5"), "SLURM_NODEID is not set"), (without("SLURM_STEP_TASKS_PER_NODE"), "--ntasks-per-node"),
    (without("SLURM_LOCALID"), "SLURM_LOCALID"), (without(SLURM_PROCID="x"), "not a whole number"), (without(WORLD_SIZE="4"), "WORLD_SIZE=4 is set"), (without("SLURM_JOB_ID"), "SLURM_JOB_ID"),
])
def test_from_slurm_refuses(environ, message):
    with pytest.raises(ValueError, match=re.escape(message)): from_slurm(environ)


@pytest.mark.parametrize("text, hosts", [("gpu[03-05,9],big1", ["gpu03", "gpu04", "gpu05", "gpu9", "big1"]), ("n1", ["n1"]), ("a,b", ["a", "b"]), ("n[098-101]", ["n098", "n099", "n100", "n101"]),
                                         ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]), ("a.b-c[1].d", ["a.b-c1.d"])])
def test_node_lists(text, hosts): assert devices._hosts(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a[1-2", "a]", "a[]", "a[1-]", "a[[1]]"])
def test_broken_node_lists(text):
    with pytest.raises(ValueError, match="node list"): devices._hosts(text)


def test_steps_of_a_job_have_ports_of_their_own():
    ports = {from_slurm(without(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))["MASTER_PORT"] for job in (1, 2, 99999999) for step in (0, 1, 4294967290)}
    assert len(ports) == 9 and all(20000 <= int(p) < 30000 for p in ports)


# --- several processes

def both(folder):
    "What two processes see of each other; the last thing is that the second one fails."
    rank, world = processes()
    accelerated = accelerator("cpu")
    rows = torch.full((rank * 2, 3), float(rank))       # the first has none
    seen = dict(world=world, number=accelerated.process_index, threads=torch.get_num_threads(), names=gather([f"é{rank}"] * rank), shapes=[list(t.shape) for t in gather(torch.zeros(rank, 2))],
                rows=gather_rows(rows).tolist(), total=total(torch.tensor([rank, 1])).tolist(), flags=total(torch.tensor(True)).item(),
                everyone=[everyone(True), everyone(rank == 0), everyone(False)], broadcast=broadcast({"from": rank}))
    with pytest.raises(ValueError, match="do not fit together"): gather_rows(torch.zeros(1, rank + 1))
    with main_first():
        if rank == 0: Path(folder, "made").write_text("x")
        assert Path(folder, "made").exists()
    with pytest.raises(RuntimeError if rank else OSError, match="disk full"):
        with main_first():
            if rank == 0: raise OSError("disk full")
    with Stopping() as stopping:
        if rank: signal.raise_signal(signal.SIGTERM)
        seen["stop"] = [stopping.asked, stopping.agreed()]
    layer = torch.nn.Linear(3, 2, bias=False).double()
    torch.nn.init.constant_(layer.weight, rank + 1.)       # the main process's weights count
    layer = accelerated.prepare(layer)
    accelerated.backward(layer(torch.full((1, 3), rank + 1.).double()).mean())
    seen["gradient"], seen["weight"] = layer.module.weight.grad.tolist(), layer.module.weight[0, 0].item()
    assert accelerator("cpu", "bfloat16").mixed_precision == "bf16" and processes() == (rank, 2)
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    wait()
    if rank: raise LookupError("nothing at all")


def test_two_processes(tmp_path):
    with pytest.raises(Exception, match=r"(?s)Process 1.*in both.*LookupError: nothing at all"): launch(both, (str(tmp_path),), processes=2, device="cpu")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("number"), second.pop("number")) == (0, 1) and (first.pop("stop"), second.pop("stop")) == ([False, True], [True, True])
    assert first == second == dict(world=2, threads=max(1, torch.get_num_threads() // 2), names=[[], ["é1"]], shapes=[[0, 2], [1, 2]], rows=[[1.] * 3] * 2, total=[1, 2], flags=2,
                                   everyone=[True, False, False], broadcast={"from": 0}, gradient=[[.75] * 3] * 2, weight=1.)


def test_launch_refuses_what_fresh_processes_cannot_find(monkeypatch):
    def inner(): pass
    for function in (inner, lambda: 1):
        with pytest.raises(ValueError, match="put it at the top of a file"): launch(function, device="cpu")
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="processes must be"): launch(processes, processes=wrong, device="cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there are 2 GPUs"): launch(processes, processes=3, device="cuda")


def test_a_notebooks_function_on_gpus_goes_to_accelerates_launcher(monkeypatch):
    import accelerate
    def fake(function, args, num_processes, use_port):
        for rank in range(num_processes): monkeypatch.setenv("RANK", str(rank)); function(*args)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2); monkeypatch.setattr(accelerate, "notebook_launcher", fake)
    assert launch(lambda x: [x, object], (3,), processes=2) == [[3, "<class 'object'>"]] * 2
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="restart the kernel"): launch(lambda: 1, processes=2)


# --- slow: real launchers

ADD_UP = """
import json, os, sys
from mbd.devices import accelerator, from_slurm, gather, processes, total
import torch
os.environ.update(from_slurm(os.environ))
tool = accelerator("cpu")
rank, world = processes()
if rank == 0: print(json.dumps([world, int(total(torch.tensor(rank))), gather([rank, tool.local_process_index, torch.get_num_threads()]), sys.argv[1:]]), flush=True)
else: total(torch.tensor(rank)), gather([rank, tool.local_process_index, torch.get_num_threads()])
torch.distributed.destroy_process_group()
"""


def answer(text): return json.loads(next(line for line in text.splitlines() if line.startswith("[")))


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    "Two processes on the CPU. `--multi_gpu` is Accelerate's word for several processes of one computer; with `--cpu` it starts one, whatever --num_processes says."
    (tmp_path / "add_up.py").write_text(ADD_UP)
    words = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", "2"]
    done = subprocess.run([sys.executable, "-m", *words, str(tmp_path / "add_up.py")],
                          capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert answer(done.stdout)[:3] == [2, 1, [[0, 0, 1], [1, 1, 1]]]


def script():
    "The sbatch script as it stands in the chapter."
    for cell in json.loads((ROOT / "nbs/13_devices.ipynb").read_text(encoding="utf-8"))["cells"]:
        found = re.search(r"```bash\n(#!/bin/bash\n.*?)```", "".join(cell["source"]), re.S)
        if found and cell["cell_type"] == "markdown": return found[1]
    raise AssertionError("chapter 13_devices has no sbatch script")


SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"): words.pop(0)
nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=nodes * each, SLURM_STEP_TASKS_PER_NODE=f"{{each}}(x{{nodes}})", SLURM_STEP_NODELIST=os.environ["SLURM_JOB_NODELIST"])
tasks = [subprocess.Popen(words, env={{**os.environ, **{{n: str(v) for n, v in dict(step, SLURM_PROCID=i, SLURM_LOCALID=i % each, SLURM_NODEID=i // each).items()}}}}) for i in range(nodes * each)]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("status", [0, 75, 3])
def test_the_sbatch_script_of_the_chapter(tmp_path, status):
    "With 2 nodes of 2 tasks; after a status of its own the script asks for another turn, or does not."
    text = script()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "4" and options["nodes"] == "2" and "requeue" in options and options["signal"].startswith("USR1@")
    (tmp_path / "add_up.py").write_text(ADD_UP)
    mbd = f'exec "{sys.executable}" "{tmp_path}/add_up.py" "$@"\n' if status == 0 else f"exit {status}\n"
    for name, content in {"srun": SRUN.format(python=sys.executable), "mbd": "#!/bin/bash\n" + mbd, "scontrol": f'#!/bin/bash\necho "$@" > "{tmp_path}/scontrol.txt"\n'}.items():
        (tmp_path / name).write_text(content); (tmp_path / name).chmod(0o755)
    (tmp_path / "train.sh").write_text(text)
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMP_", "MBD_")) and n not in TOLD}
    job = dict(SLURM_JOB_ID=str(40000 + os.getpid()), SLURM_NNODES="2", SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="2", SLURM_JOB_NODELIST="localhost,other", SLURM_CPUS_PER_TASK=options["cpus-per-task"], SLURM_PROCID="0")
    done = subprocess.run(["bash", str(tmp_path / "train.sh")], capture_output=True, text=True, timeout=300, cwd=ROOT, env={**kept, **job, "PATH": f"{tmp_path}{os.pathsep}{kept['PATH']}", "PYTHONPATH": str(ROOT)})
    assert done.returncode == status, done.stderr[-3000:]
    if status == 0: assert answer(done.stdout) == [4, 6, [[0, 0, 1], [1, 1, 1], [2, 0, 1], [3, 1, 1]], ["train", "ucf101", "-p", "preset", "full", "-p", "batch_norm", "synced"]]
    assert (tmp_path / "scontrol.txt").exists() == (status == 75)
    if status == 75: assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", job["SLURM_JOB_ID"]]
