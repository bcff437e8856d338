"""What New-LLM promises, one sentence each:  python -m pytest -q
Run as a script, this file measures:  python test_newllm.py --help"""
import argparse, bisect, collections, contextlib, copy, functools, http.server, io, itertools, json
import math, os, random, re, shlex, statistics, subprocess, sys, tempfile, threading, time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest, torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.benchmark import Timer

import chat, newllm
from newllm import (IM_END, IM_START, UNK, Cell, Config, Dialogue, NewLLM, Phase, Phase1, Phase2,
                    Tokenizer, answer, context, load, read_checkpoint, solve, walk)

REPO = Path(newllm.__file__).resolve().parent
TINY = ("--small --samples 6 --embed-dim 32 --context-dim 32 --hidden-dim 64 --iterations 3 "
        "--epochs 3 --batch-tokens 128 --device cpu")

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

def tiny(vocab_size=200, **changes):
    sizes = dict(embed_dim=16, context_dim=24, hidden_dim=32)
    return NewLLM(Config(**{**sizes, **changes}), vocab_size)
@functools.cache
def trained(layers):
    """A model whose recurrence has learned something: the harder case for the solver."""
    model = tiny(solver="sequential", joint=True, num_layers=layers, token_input_all_layers=True)
    with torch.enable_grad():
        train(model, torch.randint(3, 200, (8, 48)), 40)
    return model.eval()
def train(model, ids, steps):
    """An ordinary training loop. Returns its losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

def run(options, code=0, program=newllm):
    """newllm.py or chat.py in this process: what it prints, after a look at the exit code."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.main(shlex.split(options))
        except SystemExit as e:
            found = e.code
    assert found == code, out.getvalue() + err.getvalue()
    return err.getvalue() if code == 2 else out.getvalue()
def one_line(want, options, program=newllm):
    """A program ends with exit code 2, and says why in one line."""
    said = run(options, 2, program)
    assert want in said and said.startswith(f"{program.__name__}.py: "), said
    assert said.count("\n") == 1 and len(said) < 500, said
def figures(said, phase=2, name="loss"):
    """A figure of each pass, from what a run printed."""
    part = said.partition("\nPhase 2:")[2 * phase - 2]
    return [float(x) for x in re.findall(rf" \| {name} ([\d.e+-]+)", part)]
def same_figures(a, b, within=2e-3):
    for phase, name in ((1, "loss"), (1, "change"), (2, "loss")):
        assert len(figures(a, phase, name)) == 3
        assert figures(a, phase, name) == pytest.approx(figures(b, phase, name), rel=within)
def talk(*contents):
    """Messages of a user and an assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [dict(role=role, content=content) for role, content in zip(roles, contents)]
def chats(pairs, name="chats.jsonl"):
    """A file of dialogues of one question and one answer each. Returns what is in it."""
    Path(name).write_text("".join(json.dumps(dict(messages=talk(*p))) + "\n" for p in pairs))
    return Path(name).read_text()
def shipped(number):
    """The first question and answer of the first shipped dialogues."""
    lines = (REPO / "data/chats.jsonl").read_text("utf-8").splitlines()[:number]
    return [[m["content"] for m in json.loads(line)["messages"][:2]] for line in lines]

# --- contexts, loss, generation
@pytest.mark.parametrize("T", [512, 4096])
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_contexts_of_all_tokens_at_once_are_those_of_reading_token_by_token(layers, T):
    model, s0 = trained(layers), torch.rand(2, 24) * 2 - 1
    u = model.cell.token_in(model.embedded(torch.randint(0, 200, (2, T))))
    walked, (solved, sweeps) = walk(model.cell, u, s0)[0], solve(model.cell, u, s0)
    assert 1 <= sweeps <= 9 and (context(solved) - context(walked)).abs().max() <= 1e-4

@pytest.mark.parametrize("layers", [1, 3])
def test_the_parallel_gradient_is_that_of_backpropagation_through_time(layers):
    model, ids, gradients = trained(layers), torch.randint(0, 200, (2, 1000)), []
    s0, weights = torch.rand(2, 24) - 0.5, torch.randn(2, 1000, 24)
    learns = (s0.requires_grad_(), *model.cell.parameters(), model.embed.weight)
    for solver in ("parallel", "sequential"):
        loss = (context(model.states(ids, s0, solver=solver)) * weights).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, learns)]))
    assert model.sweeps and F.cosine_similarity(*gradients, dim=0) >= 0.9999

@pytest.mark.parametrize("learns", [False, True])
def test_a_solver_that_does_not_settle_gives_the_loops_states_and_says_so(
        learns, capsys, monkeypatch):
    for name in ("MAX_SWEEPS", "RECORDED"):
        monkeypatch.setattr(newllm, name, 1)
    model, ids = tiny(), torch.randint(0, 200, (1, 300))
    with torch.set_grad_enabled(learns):
        states = model.states(ids, solver="parallel")
    assert torch.equal(states, model.states(ids, solver="sequential"))
    assert "not settled" in capsys.readouterr().out and states.requires_grad == learns

@torch.no_grad()
def test_labels_mean_what_they_mean_to_hugging_face():
    model, ids = tiny().eval(), torch.randint(0, 200, (3, 40))
    labels = ids.masked_fill(torch.rand(3, 40) < 0.5, -100)
    out = model(input_ids=ids, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.isclose(out.loss, want, rtol=1e-4) and model(ids).loss is None

def test_an_ordinary_training_loop_trains_it():
    first, *_, end = train(tiny(), torch.randint(0, 200, (4, 60)), 15)
    assert end < 0.8 * first

def test_greedy_generation_takes_the_likeliest_word_that_may_be_said():
    model, ids = tiny(vocab_size=300).eval(), torch.randint(3, 200, (2, 12))
    greedy, logits = model.generate(ids, 8), model(ids).logits[:, -1]
    logits[:, [UNK, IM_START]] = -9e9
    assert torch.equal(greedy[:, :12], ids) and torch.equal(greedy[:, 12], logits.argmax(-1))
    assert torch.equal(model.generate(ids, 8, do_sample=True, temperature=0.0), greedy)
    state = model(ids[:, :-1]).state
    assert torch.equal(model.generate(ids[:, -1:], 8, state=state)[:, 1:], greedy[:, 12:])

def test_a_model_can_be_saved_for_the_hub_and_loaded_again():
    model, ids = tiny(num_layers=2, dropout=0.1).eval(), torch.randint(0, 200, (1, 20))
    model.vocab += 7
    model.save_pretrained("hub")
    again = NewLLM.from_pretrained("hub").eval()
    assert again.config == model.config and torch.equal(again.vocab, model.vocab)
    assert torch.equal(again(ids).logits, model(ids).logits)

def test_a_subclass_of_config_sets_other_defaults():
    @dataclass
    class Deep(Config):
        num_layers: int = 3
    assert len(NewLLM(Deep(), 9).cell.hidden) == 2

# --- data
@pytest.mark.parametrize("name", ["text.txt", "A.TXT", "notes.md", "b.text"])
def test_a_plain_text_is_learned_to_its_last_word_whatever_its_suffix(name):
    Path(name).write_text("All happy families are alike.\n" * 50)
    train, _, vocab = load(Config(data=name, max_len=31))
    assert all(d.mask.all() for d in train)
    assert "".join(Tokenizer(vocab).decode(d.ids.tolist()) for d in train) == Path(name).read_text()

def test_a_file_of_ones_own_is_read_whole_with_the_settings_of_medium():
    medium, mine = newllm.parse(["--medium"]), newllm.parse(["--data", "mine.jsonl"])
    assert mine == replace(medium, data="mine.jsonl", samples=0, embeddings="learned")
    assert newllm.parse(["--data", "mine.jsonl", "--small"]).batch_tokens == Config.batch_tokens

def test_exactly_the_assistants_words_and_their_end_are_learned():
    t = Tokenizer()
    d = t.dialogue([dict(role="system", content="Be kind."), *talk("hi!", "Hello, you.")])
    assert t.decode(d.ids.tolist()) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n hi!<|im_end|>\n"
        "<|im_start|>assistant\nHello, you.<|im_end|>\n")
    assert t.decode(d.ids[d.mask].tolist()) == "Hello, you.<|im_end|>"
    assert t.question("hi!") == t.dialogue(talk("hi!", "x")).ids.tolist()[:-3]

def test_content_in_parts_is_read_as_its_text():
    parts = [dict(type="text", text="hi "), dict(type="image"), dict(type="text", text="you")]
    assert Tokenizer().question(parts) == Tokenizer().question("hi you")

def test_the_first_ten_shipped_dialogues_hold_each_question_once_at_each_of_three_turns():
    lines = (REPO / "data/chats.jsonl").read_text("utf-8").splitlines()[:10]
    questions = [[m["content"] for m in json.loads(line)["messages"][::2]] for line in lines]
    turns = [set(turn) for turn in zip(*questions, strict=True)]
    assert len(turns) == 3 and len(turns[0]) == 10 and turns[0] == turns[1] == turns[2]

# --- a whole run
@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of python newllm.py --small, and what it said."""
    folder = tmp_path_factory.mktemp("small")
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        return folder, run("--small --device cpu")

@pytest.fixture(scope="module")
def small_model(small_run):
    return chat.open_model(small_run[0] / "checkpoints")[0]

@pytest.mark.parametrize("typed", [str, str.upper, str.title])
def test_small_answers_its_ten_dialogues_right_also_in_capitals(typed, small_model):
    assert [answer(small_model, typed(q)) for q, _ in shipped(10)] == [a for _, a in shipped(10)]

def test_small_answers_a_second_question_as_well_as_the_first(small_model):
    t, wrong = Tokenizer(small_model.vocab.tolist()), []
    for (q1, a1), (q2, a2) in itertools.product(shipped(10), repeat=2):
        ids = torch.tensor([t.dialogue(talk(q1, a1)).ids.tolist() + t.question(q2)])
        said = t.decode(small_model.generate(ids)[0, ids.shape[1]:-1].tolist())
        wrong += [(q1, q2, said)] if said != a2 else []
    assert not wrong

def test_by_heart_phase_1_ends_when_95_percent_of_the_contexts_have_converged():
    chats(shipped(10))
    said = run(f"{TINY} --data chats.jsonl --iterations 100 --epochs 1 --batch-tokens 64")
    converged = figures(said, 1, "converged")
    assert len(converged) < 100 and converged[-1] >= 0.95 > max(converged[3:-1])  # after warm-up
    assert "advice" not in said

def test_phase_1_does_not_end_while_its_learning_rate_still_warms_up():
    chats(shipped(3))
    assert len(figures(run(f"{TINY} --data chats.jsonl --iterations 20"), 1)) > 5

def test_below_95_percent_it_says_what_to_raise():
    assert "advice: under 95% converged; raise --iterations" in run(f"{TINY} --iterations 2")

def test_twelve_layers_learn_the_ten_dialogues_by_heart():
    chats(shipped(10))
    said = run(f"{TINY} --data chats.jsonl --num-layers 12 --context-dim 64 --iterations 40 "
               "--learning-rate 0.004 --epochs 12")
    assert figures(said, 2, "right")[-1] == 1

def interrupt(monkeypatch, phase, at):
    """Ctrl-C in the step with that number."""
    count = itertools.count(1)
    def step(self, batch, original=Phase.step):
        if self.name == phase and self.model.training and next(count) == at:
            raise KeyboardInterrupt
        return original(self, batch)
    monkeypatch.setattr(Phase, "step", step)

@pytest.mark.parametrize("mode", ["", "--joint --dropout 0.2", "--hold-out"])
@pytest.mark.parametrize("phase, at, left", [("Phase 1", 8, 3), ("Phase 2", 8, 2)])
def test_an_interrupted_run_goes_on_as_if_it_had_never_stopped(
        mode, phase, at, left, monkeypatch):
    run(f"{TINY} {mode} --out whole")
    interrupt(monkeypatch, phase, at)
    run(f"{TINY} {mode} --out parts", 130)
    os.rename("parts", "moved")
    said = run("--resume --out moved")
    assert len(figures(said)) == left and (phase == "Phase 2") == (not figures(said, 1))
    a, b = (read_checkpoint(Path(out, "training.pt")) for out in ("whole", "moved"))
    assert a["progress"] == b["progress"] and a["progress"]["done"] == 3
    assert all(torch.equal(t, b["NewLLM"][k]) for k, t in a["NewLLM"].items())

def test_after_ctrl_c_in_the_very_first_pass_the_advice_to_resume_is_true(monkeypatch):
    interrupt(monkeypatch, "Phase 1", 1)
    assert "--resume goes on" in run(TINY, 130)
    assert len(figures(run("--resume"), 1)) == 3

def test_resume_takes_the_settings_of_its_run_and_refuses_others():
    chats(shipped(5))
    run(f"{TINY} --data chats.jsonl --epochs 1")
    one_line("leave out --context-dim", "--resume --context-dim 48")
    one_line("leave out --small", "--resume --small")
    chats(shipped(9))
    one_line("has changed since the run began", "--resume")

def test_a_full_disk_leaves_the_old_checkpoint_whole_and_nothing_else(monkeypatch):
    Path("checkpoints").mkdir()
    Path("checkpoints/model.0").write_bytes(b"half")  # what a kill in a write leaves
    run(f"{TINY} --epochs 1")
    before = {path.name: path.read_bytes() for path in Path("checkpoints").iterdir()}
    def save(_, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", save)
    one_line("No space left on device", TINY)
    assert before == {path.name: path.read_bytes() for path in Path("checkpoints").iterdir()}
    assert sorted(before) == ["model.pt", "training.pt"]

def test_a_batch_too_large_for_memory_is_computed_in_parts_with_the_same_losses(monkeypatch):
    chats([*shipped(10), *shipped(2)])
    monkeypatch.setattr(newllm, "tokens_that_fit", lambda model: 60)
    options = f"{TINY} --data chats.jsonl --embeddings learned"
    whole = run(options)
    def compute(self, part, original=Phase.compute):
        if self.model.training and len(part) > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9")
        return original(self, part)
    monkeypatch.setattr(Phase, "compute", compute)
    parts = run(options)
    assert "memory: too little" in parts and "memory" not in whole
    same_figures(whole, parts)

def test_on_a_gpu_as_many_tokens_are_computed_at_a_time_as_half_the_free_memory_holds(monkeypatch):
    model, free = mock.MagicMock(config=Config()), 8 * 10 ** 9
    model.vocab.configure_mock(**{"device.type": "cuda", "__len__.return_value": 50_000})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    assert 0.9 < newllm.tokens_that_fit(model) * 3 * 4 * 50_000 / (free / 2) <= 1

# --- notebooks, streams, folders, and what goes wrong
def test_in_a_notebook_an_interrupt_does_not_end_the_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    interrupt(monkeypatch, "Phase 1", 1)
    assert newllm.main(TINY.split()) is None

def test_the_notebook_for_colab_runs_and_so_does_newllm_py_pasted_into_a_cell():
    client, form = map(pytest.importorskip, ("nbclient", "nbformat"))
    Path("data").symlink_to(REPO / "data")
    short = re.sub(r"(    (epochs|iterations): int = option\()\d+", r"\g<1>1",
                   (REPO / "newllm.py").read_text("utf-8"))  # one pass of each phase
    Path("newllm.py").write_text(short, "utf-8")
    book = form.read(REPO / "data/colab.ipynb", 4)
    book.cells[:1] = []  # it installs packages
    book.cells.append(form.v4.new_code_cell(short))
    *_, chatting, pasted = client.NotebookClient(book, timeout=100).execute().cells
    assert "New-LLM:" in str(chatting.outputs) and "python chat.py" in str(pasted.outputs)

def test_the_tokenizer_is_found_from_any_folder_offline(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", None)
    assert Tokenizer().decode(Tokenizer().encode("hello")) == "hello"

@pytest.mark.parametrize("program, options", [(newllm, "--resume"), (chat, "--prompt hello")])
def test_a_screen_without_emoji_and_a_reader_that_goes_away_end_nothing(program, options):
    chats([("hello", "\U0001f642")] * 9)
    run(f"{TINY} --data chats.jsonl --iterations 30 --epochs 9 --batch-tokens 20")
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(screen):
        program.main(options.split())
    screen.flush()
    assert b"?\n" in screen.buffer.getvalue()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
        program.main(options.split())

GOOD = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
BAD_FILES = {
    GOOD + "\n{oops\n": "line 3 is no dialogue", f"[{GOOD}]": "line 1 is no dialogue",
    GOOD + GOOD.replace("user", "wizard"): "line 2 is no dialogue (message with role 'wizard'",
    GOOD.replace('"a"', "null"): "role 'assistant' and content None",
    GOOD.replace('"a"', "5"): "content 5", GOOD.replace("content", "text"): "(no 'content')",
    '{"text": "hi"}': "line 1 is no dialogue (no 'messages')", "\x00\udcff\udcfe\udc80": "UTF-8",
    '{"messages": []}': "too few answers", GOOD.replace("assistant", "user"): "too few answers",
    "": "too few answers"}
BAD_OPTIONS = {
    "--data nowhere.jsonl": "nowhere.jsonl", "--data ..": "..", "--data x.jsonl": "x.jsonl",
    "--data=": "cannot read dataset", "--data good.jsonl --hold-out": "too few answers",
    "--val-data nowhere.txt": "nowhere.txt", "--val-data empty.jsonl": "too few answers",
    f"{TINY} --out good.jsonl/x": "cannot write", "--device cuda:99": "is not there",
    "--device cpu:x": "--device cpu:x", "--hidden-dim many": "invalid int value: 'many'",
    "--context-dim=-4": "--context-dim -4", "--learning-rate nan": "--learning-rate nan",
    "--dropout 1.5": "--dropout 1.5", "--seed 99999999999999": "give 0 to",
    "--small --medium": "not allowed with", "--huge": "unrecognized arguments: --huge",
    "--solver newton": "invalid choice: 'newton'", "--embeddings none": "invalid choice: 'none'",
    "--resume": "cannot read checkpoints/training.pt",
    f"{TINY} --iterations 0 --learning-rate 2e9": "lower --learning-rate"}

@pytest.mark.parametrize("options, want, content", [
    *((options, want, "") for options, want in BAD_OPTIONS.items()),
    *(("--data bad.jsonl", want, content) for content, want in BAD_FILES.items())])
def test_bad_options_and_files_get_one_line_that_names_the_place(options, want, content):
    Path("bad.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    Path("good.jsonl").write_text(GOOD)
    Path("empty.jsonl").touch()
    Path("x.jsonl").mkdir()
    one_line(want, options)

@pytest.mark.parametrize("broken", [
    b"", b"PK\x03\x04 a zip", torch.zeros(2), dict(a=1), dict(config=dict(patience=2), model={}),
    NewLLM(Config(hidden_dim=8), 9)], ids=["empty", "zip", "tensor", "dict", "older", "code"])
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(broken):
    Path("checkpoints").mkdir()
    for name, options, program in (("training.pt", "--resume", newllm), ("model.pt", "", chat)):
        path = Path("checkpoints", name)
        path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, path)
        one_line(name, options, program)

# --- several processes, and the hub, played by a small server on this machine
def run_apart(*command, code=0, **environment):
    """A new process: what it prints, after a look at the exit code."""
    fixed = dict(PYTHONPATH=str(REPO), OMP_NUM_THREADS="1", HF_HOME=str(Path("hf").resolve()))
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True, timeout=100,
                          env={**os.environ, **environment, **fixed})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout

def test_two_processes_train_to_the_losses_of_one_and_only_torchrun_makes_two():
    options = f"{TINY} --batch-tokens 256"
    two = run_apart(*"-m torch.distributed.run --standalone --local-addr 127.0.0.1".split(),
                    "--nproc-per-node=2", str(REPO / "newllm.py"), *options.split())
    one = run_apart(str(REPO / "newllm.py"), *options.split(), WORLD_SIZE="2", RANK="1")
    same_figures(two, one)

class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does: repository info, file lists, files with Range requests."""
    files, sent = {}, []
    def do_GET(self):
        repository, _, name = self.path.partition("?")[0].partition("/resolve/")
        posted = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        listed = [dict(type="file", path=path, rfilename=path, size=len(body), oid="b")
                  for path, body in self.files.items() if not posted or path in posted]
        info = dict(id="/".join(repository.split("/")[3:5]), sha="a" * 40, siblings=listed)
        body = (self.files.get(name.partition("/")[2], b"") if name else
                json.dumps(listed if posted or "/tree/" in repository else info).encode())
        headers = {"Content-Type": "application/json", "ETag": '"b"', "X-Repo-Commit": "a" * 40}
        span, size = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")), len(body)
        if span:
            begin, end = int(span[1]), min(int(span[2] or size), size - 1)
            body, headers["Content-Range"] = body[begin:end + 1], f"bytes {begin}-{end}/{size}"
        self.send_response(401 if not self.files else 206 if span else 200 if body else 404)
        for header in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.sent.append(len(body))
            self.wfile.write(body)
    do_HEAD = do_POST = do_GET

def with_hub(files, code, exit_code=0):
    """What a new process prints that runs some code with such a hub."""
    Hub.files, Hub.sent = files, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = run_apart("-c", f"import newllm; {code}", code=exit_code,
                         HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    return said

def test_gpt2s_embeddings_are_downloaded_once_and_stay_as_they_are_also_with_joint():
    table = torch.randn(50257, 768) * 0.1
    save_file({"wte.weight": table, "z": torch.ones(9)}, "gpt2.safetensors")
    with_hub({"model.safetensors": Path("gpt2.safetensors").read_bytes()},
             f"[newllm.main('{TINY} --embeddings gpt2 --joint --epochs 1'.split()) for _ in '12']")
    model = chat.open_model("checkpoints")[0]
    assert torch.equal(model.embed.weight[3:], table[model.vocab[3:]]) and model.head is None
    assert sum(size > table.nbytes for size in Hub.sent) == 1

def test_ultrachat_is_streamed_from_the_hub_into_the_cache():
    lines = (REPO / "data/chats.jsonl").read_bytes().splitlines(keepends=True)
    config = [dict(config_name="default", data_files=[
        dict(split=split, path=f"data/{split}.jsonl") for split in ("train_sft", "test_sft")])]
    said = with_hub({"data/train_sft.jsonl": b"".join(lines[:300]),
                     "data/test_sft.jsonl": b"".join(lines[300:350]),
                     "README.md": f"---\nconfigs: {json.dumps(config)}\n---\n".encode()},
                    "newllm.load(newllm.Config('ultrachat', 'ultrachat', 12))")
    assert "data: 12 dialogues" in said, said
    train, val, _ = load(Config(data="ultrachat", val_data="ultrachat", samples=12))  # no hub
    assert (len(train), len(val)) == (12, 2) and len(list(Path("cache").glob("*.jsonl"))) == 2

def test_when_the_hub_refuses_the_message_says_what_it_said():
    said = with_hub({}, "newllm.main(['--medium'])", exit_code=2)
    assert "ultrachat_200k (" in said and "401" in said and said.count("\n") == 1

@pytest.mark.parametrize("options, want, code", [
    ("--data ultrachat", "--data data/chats.jsonl", 2),
    ("--embeddings auto --iterations 0 --epochs 1", "now learned instead", 0)])
def test_without_a_network_there_is_one_line_within_seconds(options, want, code):
    start, command = time.perf_counter(), [str(REPO / "newllm.py"), *options.split()]
    said = run_apart(*command, code=code, HF_ENDPOINT="http://127.0.0.1:9")
    assert want in said and time.perf_counter() - start < 60
    assert said.count("\n") == 1 or not code

# --- chat.py
@pytest.fixture
def chat_with(small_run, monkeypatch):
    """Chat with the small model in lines of standard input. Returns the lines of the answers."""
    def answers(options, *lines):
        typed = io.BytesIO("\n".join(lines).encode("utf-8", "surrogateescape"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, "utf-8"))
        return run(f"--checkpoint {small_run[0]}/checkpoints {options}", program=chat).splitlines()
    return answers

def test_chat_answers_every_line_of_standard_input(chat_with):
    (q1, a1), (q2, a2) = shipped(2)
    assert chat_with("", q1, "", q2, "/quit", q1) == [a1, a2]

def test_an_answer_that_was_cut_ends_in_dots(chat_with):
    assert chat_with("--prompt hello --max-new-tokens 2")[0].endswith(" ...")

def test_bytes_that_are_no_text_are_answered_too(chat_with):
    assert len(chat_with("", "hel\udcfflo")) == 1

def test_a_model_of_a_plain_text_continues_it():
    Path("five.txt").write_text("Roses are red\nViolets are blue\nSugar is sweet\n" * 5)
    run(f"{TINY} --data five.txt --iterations 40 --epochs 9 --batch-tokens 32")
    Path("checkpoints/training.pt").unlink()  # chat.py has no need of it
    model = chat.open_model("checkpoints")[0]
    assert answer(model, "Violets are", 1) == "blue" and answer(model, "", 1) != ""
    assert run("--prompt 'Violets are' --max-new-tokens 1", program=chat).split() == ["blue", "..."]

def test_without_a_model_chat_says_how_to_make_one():
    one_line("python newllm.py --small", "--prompt hi", chat)

# --- what follows runs as a script and measures: other models in New-LLM's place, as large as it is
JOINT = ("GRU", "GRU-2", "GRU-token", "Transformer")  # trained as such models are, all at once
LIKE_OURS = ("New-LLM", "norm-diversity")  # its Phase 1 has the original's loss
CELLS = ("original", "input-gate", "LayerNorm")
KINDS = (*LIKE_OURS, "context-only", *CELLS, *JOINT)
WIDE = "--large --max-len 512 --num-layers 1 --context-dim 600 --hidden-dim 600"  # for new text

def settings(options, *more):
    """A Config from options of newllm.py. What was typed comes last and wins."""
    return newllm.parse([*options.split(), "--embeddings", "learned", *more])
def write_rows(o, path):
    text = json.dumps(dict(machines=o.machines, rows=o.rows), indent=1)
    newllm.write(Path(path), lambda file: file.write_text(text))

def once(o, key, measure):
    """The row with this key: kept from an earlier run, or measured, kept and printed now."""
    key = key | (dict(settings=" ".join(o.more)) if o.more else {})
    for row in o.rows:
        if all(row.get(k) == v for k, v in key.items()):
            return row
    row = json.loads(json.dumps(key | measure()))
    o.rows.append(row)
    for path in o.json[:1]:
        write_rows(o, path)
    print(*(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
          sep=" | ")
    return row

class OtherCell(Cell):
    """The original has an input gate of its own and LayerNorm in the loop. Or one of them."""
    def __init__(self, config, kind):
        super().__init__(config)
        self.own, self.normed, ours = kind != "LayerNorm", kind != "input-gate", self.gates.bias
        self.gates = nn.Linear(config.hidden_dim, (2 + self.own) * config.context_dim)
        if kind != "original":
            self.gates.bias.data[:config.context_dim] = ours.data[:config.context_dim]
    def forward(self, u, s):
        a = F.silu(u + self.state_in(s))
        for layer in self.hidden:
            a = a + F.silu(layer(a))
        f, d, *own = torch.sigmoid(self.gates(a)).chunk(2 + self.own, -1)
        s = f * s + (own[0] if own else 1 - f) * (2 * d - 1)
        return (context(s) if self.normed else s), f

class StateOnly(nn.Linear):
    """The usual head: it does not read the token, which stands behind the state."""
    def forward(self, both):
        return super().forward(both[..., :self.in_features])

class Other(NewLLM):
    """Another model with New-LLM's embeddings and output, so that the same phases train it."""
    def __init__(self, kind, config, V, size):
        hidden = size * config.hidden_dim // config.context_dim
        like_ours = replace(config, context_dim=size, hidden_dim=hidden)
        super().__init__(config if kind in JOINT else like_ours, V)
        self.kind, self.size, E = kind, size, config.embed_dim
        if kind in CELLS:
            self.cell = OtherCell(like_ours, kind)
        elif kind == "Transformer":
            layers = [nn.TransformerEncoderLayer(size, 4, 4 * size, config.dropout, "gelu",
                                                 batch_first=True, norm_first=True) for _ in "12"]
            self.cell = nn.ModuleList([nn.Linear(E, size), *layers])
        elif kind in JOINT:
            widths = (E, size) if kind == "GRU-2" else (E,)
            self.cell = nn.ModuleList(nn.GRU(n, size, batch_first=True) for n in widths)
        if kind == "GRU-token":
            self.query = nn.Linear(size + E, E)
        elif kind not in CELLS:
            self.query = StateOnly(size, E)
    def states(self, ids, state=None, solver=None):
        """As New-LLM's. Two GRUs' states stand side by side, the upper one's first."""
        if self.kind not in JOINT:
            return super().states(ids, state, "sequential")
        x, (first, *others) = self.dropout(self.embedded(ids)), self.cell
        if self.kind == "Transformer":  # the farther away, the less attention: ALiBi
            at, x = torch.arange(ids.shape[1], device=ids.device), first(x)
            bias = 0.25 ** torch.arange(1, 5, device=at.device)[:, None, None] * (at - at[:, None])
            bias = bias.masked_fill(bias > 0, -math.inf).repeat(len(ids), 1, 1)
            for layer in others:
                x = layer(x, src_mask=bias)
            return x
        starts = [None, None] if state is None else state[None].split(self.size, -1)[::-1]
        x = lower = first(x, starts[0])[0]
        for upper in others:
            x = torch.cat((upper(self.dropout(lower), starts[1])[0], lower), -1)
        return x

def parameters(model):
    """All but embeddings and head."""
    return sum(p.numel() for name, p in model.named_parameters()
               if name.split(".")[0] not in ("embed", "head", "bias"))
def make(o, kind, config, vocab):
    """A fresh model of a kind, with at most 5 % more parameters than New-LLM."""
    config = replace(config, joint=kind in JOINT)
    torch.manual_seed(config.seed)
    model = NewLLM(config, len(vocab))
    if kind not in LIKE_OURS:
        of = lambda size: parameters(Other(kind, config, 3, size))
        size = 4 + 4 * bisect.bisect_left(range(4, 1025, 4), parameters(model), key=of)
        torch.manual_seed(config.seed)
        model = Other(kind, config, len(vocab), size)
    model.vocab.copy_(torch.tensor(vocab))
    return model.to(o.device)

class Joint(Phase2):
    """Baselines learn every word of the text at once, the user's with the weight of Phase 1."""
    def loss(self, ids, mask, before):
        if not self.model.training:
            return super().loss(ids, mask, before)
        at, user = ids[:, 1:] != UNK, 1.0 if self.config.hold_out else newllm.USER
        weight, words = torch.where(mask[:, 1:][at], 1.0, user), ids[:, 1:][at]
        states = self.model.states(ids)
        scores = self.model.logits(states[:, :-1][at], ids[:, :-1][at])
        loss = weight @ F.cross_entropy(scores, words, reduction="none")
        return loss, [weight.sum(), loss, weight @ (scores.argmax(-1) == words).float()], states

def original_loss(c, before):
    change, deviation = (c - before).pow(2).mean(), (c - c.mean(0)).norm() / len(c)
    return (1 - newllm.DIVERSITY) * change - newllm.DIVERSITY * deviation

class Original1(Phase1):
    """With the original's loss, which looks at no word, on our cell's exact contexts."""
    def loss(self, ids, mask, before):
        _, sums, new = super().loss(ids, mask, before)
        old = new.detach() if before is None else before
        return original_loss(*(context(s)[ids != UNK] for s in (new, old))) * sums[0], sums, new

def learn(kind, model, train, val, cached=()):
    """Both phases as in newllm.py, or a baseline's only one. Returns the last, and what it took."""
    config, start, seen = model.config, time.perf_counter(), 0
    first = Original1 if kind == "norm-diversity" else Phase1
    gently = 1 if cached or first is Original1 else newllm.GENTLE  # has the token block learned?
    phases = [(first, config.iterations, 1), (Phase2, config.epochs, gently)]
    if kind in JOINT:
        phases = [(Joint, config.iterations + config.epochs, 1)]
    with tempfile.TemporaryDirectory() as config.out:
        for which, passes, share in phases:
            if which is Phase2:
                model.head.data.copy_(model.embed.weight)
                nn.ModuleList([model.cell, model.embed]).requires_grad_(False)
            if passes:
                phase = which(model, train, val, passes, share * config.learning_rate)
                for d, states in zip(train, cached):
                    d.states, phase.keep = states, True
                phase.fit(0, None)
                seen += phase.progress["done"] * sum(len(d.ids) for d in train)
    return phase, dict(seconds=time.perf_counter() - start, seen=seen)

# --- questions with known answers
def records_of(path):
    with newllm.explained(f"cannot read {path}", "give a .jsonl file"):
        lines = Path(path).read_text("utf-8-sig").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
def pairs_of(records):
    """What the user says and what the assistant answers, of all turns."""
    turns = itertools.chain(*(itertools.pairwise(record["messages"]) for record in records))
    return [(said["content"], reply["content"].strip()) for said, reply in turns
            if said["role"] == "user"]

def nearest(pairs, questions):
    """The answer to the training question with the most similar words, of one turn: idf, cosine."""
    bag = lambda text: set(re.findall(r"[\w']+", text.lower()))
    bags = [bag(text) for text, _ in pairs]
    counts = collections.Counter(itertools.chain(*bags))
    weight = lambda words: sum(math.log(1 + len(bags) / counts[word]) ** 2 for word in words)
    sizes = [math.sqrt(weight(words)) or 1 for words in bags]
    found = [[weight(bag(text) & words) / size for words, size in zip(bags, sizes)]
             for text in questions]
    return [pairs[scores.index(max(scores))][1] for scores in found]

def say(model, records):
    """The model's answers to what stands before each record's last message, word for word."""
    tokenizer, answers = Tokenizer(model.vocab.tolist()), []
    most = 1 if getattr(model, "kind", "") == "Transformer" else 60  # it has to read all anew
    for record in records:
        ids = tokenizer.dialogue(record["messages"][:-1]).ids.tolist()
        ids = model.vocab.new_tensor([[*ids, IM_START, *tokenizer.encode("assistant\n")]])
        begin = ids.shape[1]
        while ids.shape[1] < begin + 60 and ids[0, -1] != IM_END:
            ids = model.eval().generate(ids, most)
        said = [i for i in ids[0, begin:].tolist() if i != IM_END]
        answers.append(tokenizer.decode(said).strip())
    return answers

def shares(records, answers, pairs):
    """Share of right answers by topic, and of answers that are whole ones of the training data."""
    found, known = {"wordings": []}, {reply for _, reply in pairs}
    for record, said in zip(records, answers):
        topic = record.get("topic", "")
        topic = topic if re.fullmatch(r"unknown|memory-\d+", topic) else "wordings"
        right = record.get("answers", [record["messages"][-1]["content"]])
        found.setdefault(topic, []).append(said in [text.strip() for text in right])
    found["whole"] = [said in known for said in answers]
    return {topic: statistics.mean(group) for topic, group in found.items() if group}

def ask(o):
    """Answers to questions that training lacks, share right word for word (memory-K: of what was
    told K turns before; whole: share of answers that are some whole answer of the training data)"""
    model, records = chat.open_model(o.ask[0])[0].to(o.device), records_of(o.ask[1])
    pairs = pairs_of(records_of(model.config.data)[:model.config.samples or None])
    key = dict(table="ask", model=o.ask[0], data=o.ask[1], time=time.ctime())
    once(o, key, lambda: shares(records, say(model, records), pairs))

def wordings(o, kinds=("New-LLM", "GRU", "GRU-token", "Transformer")):
    """Models of the same size (without embeddings and head), trained by heart, asked wordings that
    training lacks: share right word for word (memory-K: of what was told K turns before)"""
    data, questions = o.wordings or (newllm.SHIPPED, str(REPO / "data/chats_val.jsonl"))
    config = settings("--medium", "--data", data, *o.more)
    train, _, vocab = load(config)
    records, pairs = records_of(questions), pairs_of(records_of(data))
    def measure():
        model = make(o, kind, replace(config, seed=seed), vocab)
        _, took = learn(kind, model, train, [])
        found = shares(records, say(model, records), pairs)
        return dict(parameters=parameters(model)) | found | took
    key = dict(table="wordings", data=data, questions=questions)
    for kind, seed in itertools.product(o.models or kinds, o.seeds or [1]):
        once(o, key | dict(model=kind, seed=seed), measure)
    answers = nearest(pairs, [record["messages"][-2]["content"] for record in records])
    once(o, key | dict(model="nearest neighbour"), lambda: shares(records, answers, pairs))

# --- new text
def split_file(path, tokens=math.inf, most=None):
    """Dialogues to train on, to choose with and to report on (80, 10, 10 %), in the vocabulary of
    the first, and this vocabulary."""
    every, limit = newllm.read(path, "train", 0, Config()), Config.max_len
    every = [Dialogue(d.ids[:limit], d.mask[:limit]) for d in every if d.mask[1:limit].any()]
    train = [d for i, d in enumerate(every) if i % 10 not in (4, 9)][:most]
    parts = [train, every[4::10], every[9::10]]
    for k, limit in enumerate((tokens, 60_000, 60_000)):
        ends = itertools.accumulate(len(d.ids) for d in parts[k])
        parts[k] = parts[k][:max(1, sum(end <= limit for end in ends))]
    seen = {tuple(d.ids.tolist()) for d in parts[0]}
    parts[1:] = ([d for d in part if tuple(d.ids.tolist()) not in seen] for part in parts[1:])
    used = torch.cat([torch.arange(3), *(d.ids for d in parts[0])]).unique()
    id_of = torch.zeros(len(newllm.EVERY)).long().index_copy(0, used, torch.arange(len(used)))
    renumbered = lambda d: Dialogue(id_of[d.ids], d.mask & (id_of[d.ids] != UNK))
    parts = [[d for d in map(renumbered, part) if d.mask[1:].any()] for part in parts]
    count = [sum(len(d.ids) for d in part) for part in parts]
    print("tokens to train on, to choose with, to report on:", *count, f"V={len(used)}")
    return parts, [newllm.EVERY[i] for i in used.tolist()]

def train_one(o, kind, parts, vocab, seed, choice):
    """Train a model on the first part, and report on the others."""
    passes = choice["epochs"]  # Phase 2 takes a quarter
    first, second = (0, passes) if kind in JOINT else (passes, max(1, passes // 4))
    config = replace(settings(WIDE, *o.more), seed=seed, dropout=choice["dropout"],
                     iterations=first, epochs=second)
    model = make(o, kind, config, vocab)
    phase, took = learn(kind, model, *parts[:2])
    val, test = (phase.run(part, learn=False) for part in parts[1:])
    return dict(val=val["perplexity"], test=test["perplexity"], right=test["right"],
                tokens=sum(len(d.ids) for d in parts[0]), parameters=parameters(model)) | took

def compare(o):
    """New text: perplexity of answers; settings are chosen on `val` with the first seed"""
    parts, vocab = split_file(o.compare, o.tokens)
    for kind in o.models or ("New-LLM", *JOINT):
        grid = dict(dropout=o.dropouts, epochs=o.epochs)
        key = dict(table="comparison", data=o.compare, limit=o.tokens, model=kind)
        run = lambda seed, choice: once(o, key | dict(seed=seed, choice=choice), lambda: train_one(
            o, kind, parts, vocab, seed, choice))
        first, *others = o.seeds or [1, 2, 3]
        choices = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        best = min((run(first, choice) for choice in choices), key=lambda row: row["val"])
        runs = [best] + [run(seed, best["choice"]) for seed in others]
        print(f"{kind}: mean test perplexity {statistics.mean(r['test'] for r in runs):.1f}")

# --- the original beside ours
def original(o):
    """Ours and the original under the same training: new text, then wordings by heart"""
    cells, epochs = o.models or ("New-LLM", "context-only", "norm-diversity", *CELLS), o.epochs[0]
    choice = dict(dropout=o.dropouts[-1], epochs=epochs)
    for most, seed in itertools.product((100, None), o.seeds or [1, 2, 3]):
        parts, vocab = split_file(o.original, most=most)
        key = dict(table="original", data=o.original, most=most, seed=seed)
        for kind in cells:
            once(o, key | dict(model=kind, choice=choice),
                 lambda: train_one(o, kind, parts, vocab, seed, choice))
        config = replace(settings(WIDE, *o.more), seed=seed, epochs=epochs)
        once(o, key | dict(model="original, its iteration", epochs=epochs),
             lambda: jacobi(o, parts, vocab, config))
    wordings(o, cells)

def jacobi(o, parts, vocab, config):
    """The original's Phase 1: each token gets its neighbour's state of the last iteration, until
    95 % have converged. Phase 2 reads these contexts. distance: mean square, from true ones."""
    model = make(o, "original", config, vocab)
    optimizer = torch.optim.AdamW(model.cell.parameters(), 2e-3)
    ids = nn.utils.rnn.pad_sequence([d.ids for d in parts[0]], True).to(o.device)
    at, converged, iterations = ids != UNK, 0.0, 0
    states, x = model.eval().states(ids).detach(), model.embedded(ids)[at].detach()
    while iterations < 2 or converged < newllm.ENOUGH and iterations < 300:
        new = model.cell(model.cell.token_in(x), F.pad(states[:, :-1], (0, 0, 1, 0))[at])[0]
        optimizer.zero_grad()
        original_loss(new, states[at]).backward()
        optimizer.step()
        change = (new - states[at]).pow(2).mean(-1)
        converged = (change < newllm.CONVERGED).float().mean().item()
        states[at], iterations = new.detach(), iterations + 1
    with torch.no_grad():
        distance = (states - model.states(ids))[at].pow(2).mean().item()
    cached = [s[:len(d.ids)] for s, d in zip(states.cpu(), parts[0])]
    model.config = replace(model.config, iterations=0, hold_out=False)  # it hides no words
    phase, took = learn("original", model, *parts[:2], cached)
    test = phase.run(parts[2], learn=False)
    return dict(iterations=iterations, converged=converged, distance=distance,
                test=test["perplexity"], right=test["right"]) | took

# --- the benchmark
def seconds(function):
    """The median of some calls, after one to warm up."""
    timer = Timer("f()", globals=dict(f=function), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.3).median

def quasi_deer(cell, u, s0):
    """Sweeps of the peer, over all tokens at once, without chunks (Gonzalez et al. 2024)."""
    states = u.new_zeros(*u.shape[:2], s0.shape[1])
    for sweeps in range(1, 41):
        before = torch.cat((s0[:, None], states[:, :-1]), 1)
        new, f = (t.view_as(states) for t in cell(u.flatten(0, 1), before.flatten(0, 1)))
        change, size = newllm.scan(f, new - states), states.std(-1, keepdim=True).clamp(min=1e-3)
        states = states + change
        if (change / size).abs().max() < newllm.TOLERANCE:
            return sweeps
    return "not settled"

def practised(o, name):
    """A model whose cell has learned, and its dialogues one after another, 32,768 tokens."""
    few = dict(small="10", medium="0 --iterations 4", large="100 --iterations 2")[name].split()
    config = settings(f"--{name}", "--data", newllm.SHIPPED, "--samples", *few, *o.more)
    train, _, vocab = load(config)
    model = make(o, "New-LLM", config, vocab)
    with tempfile.TemporaryDirectory() as config.out:
        Phase1(model, train, [], config.iterations, config.learning_rate).fit(0, None)
    text = torch.cat([d.ids for d in random.Random(0).choices(train, k=4000)])
    return model.eval(), text[None, :2 ** 15].to(o.device)

def contexts_row(model, ids):
    """What it takes to make the contexts of one text."""
    cell, E, C = model.cell, model.config.embed_dim, model.config.context_dim
    products = sum(p.numel() for p in cell.parameters() if p.dim() > 1)
    wide = round((math.sqrt(E * E + 4 * products / 3) - E) / 2)  # 3 S (E + S) products a token
    gru = nn.GRU(E, wide, batch_first=True).to(ids.device)
    x, s0 = model.embedded(ids).detach(), torch.zeros(1, C, device=ids.device)
    double, exact = copy.deepcopy(cell).double(), (x.double(), s0.double())
    loop = lambda cell=cell, x=x, s0=s0: walk(cell, cell.token_in(x), s0)[0]
    solver = lambda: solve(cell, cell.token_in(x), s0)
    ways = dict(loop=loop, solver=lambda: solver()[0], equal_gru=lambda: gru(x)[0])
    with torch.no_grad():
        row = {name: 1000 * seconds(way) for name, way in ways.items()}
        states, row["sweeps"] = solver()
        row["quasi_deer"] = quasi_deer(cell, cell.token_in(x), s0)
        exactly = context(loop(double, *exact))
    row["error"] = (context(states) - exactly).abs().max().item()
    if ids.shape[1] <= 4096:
        backward = lambda way: way().pow(2).sum().backward()
        row |= {f"{name}_back": 1000 * seconds(lambda: backward(way)) for name, way in ways.items()}
        cell.zero_grad()
        backward(ways["solver"])
        backward(lambda: loop(double, *exact))
        ours, theirs = (torch.cat([p.grad.flatten().double() for p in block.parameters()])
                        for block in (cell, double))
        row["cosine"] = F.cosine_similarity(ours, theirs, 0).item()
    return row

@torch.no_grad()
def memory_row(model, text, position):
    """Tokens/s after so many; bytes of a key-value cache of 2 layers as wide as our embeddings."""
    text, state = text.repeat(1, position // text.shape[1] + 1)[:, :position], None
    for part in text.split(4096, 1):
        state = model.states(part, state)[:, -1]
    ours = 50 / seconds(lambda: model.generate(text[:, :1], 50, eos_token_id=-1, state=state))
    return dict(ours=ours, state=state.nbytes, cache=2 * 2 * position * model.config.embed_dim * 4)

def benchmark(o):
    """Trained cells read real text: ms for T tokens (back: with backward) by the loop, the solver,
    a GRU of as many products; error and cosine to the loop's in float64; tokens/s; bytes carried"""
    for name in ("small", "medium", "large"):
        model, text = practised(o, name)
        key = dict(preset=name, threads=torch.get_num_threads())
        for T in (4096,) if name == "large" else (512, 4096, 32768):
            once(o, dict(table="contexts", T=T) | key, lambda: contexts_row(model, text[:, :T]))
        for position in (1000, 10_000, 100_000) if name == "medium" else ():
            once(o, dict(table="memory", position=position) | key,
                 lambda: memory_row(model, text, position))

# --- pictures of kept numbers
PICTURES = dict(  # of a table: x, labels of the axes, lines, title with numbers of the last row
    training=("done", "pass of Phase 1", "", dict(
        loss="loss per word", change="mean change of a context by the pass",
        converged="share of contexts that have converged"), "newllm.py --small"),
    memory=("position", "tokens read", "bytes carried to the next token", dict(
        state="New-LLM: its state", cache="Transformer, 2 layers: key-value cache"),
        "After {position:,} tokens New-LLM carries {state:,} bytes, a Transformer {cache:,}"),
    contexts=("T", "tokens of one text", "milliseconds", dict(
        loop="token by token", solver="solver", equal_gru="GRU with as many products",
        loop_back="token by token, with backward", solver_back="solver, with backward",
        equal_gru_back="GRU, with backward"),
        "{T:,} tokens: solver {solver:,.0f} ms, one by one {loop:,.0f}, GRU {equal_gru:,.0f}"))

def plot(o):
    """Pictures of the rows that other commands kept, and of newllm.py --small"""
    import matplotlib.pyplot as plt
    del newllm.print
    with tempfile.TemporaryDirectory() as folder:
        said, names = run(f"--small --device cpu --out {folder}"), PICTURES["training"][3]
    o.rows = [row for row in o.rows if row["table"] != "training"]
    for row in zip(itertools.count(1), *(figures(said, 1, name) for name in names)):
        o.rows.append(dict(zip(("done", *names), row), table="training"))
    write_rows(o, o.plot / "measured.json")
    for table, (x, xlabel, ylabel, lines, title) in PICTURES.items():
        rows = [r for r in o.rows if r["table"] == table and r.get("preset") in (None, "medium")]
        _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name, label in lines.items():
            points = sorted((row[x], row[name]) for row in rows if name in row)
            axes.loglog(*zip(*points), "o--" if "backward" in label else "o-", label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title.format(**rows[-1]))
        axes.legend()
        axes.figure.savefig(o.plot / f"{table}.png")

def script():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="The benchmark, unless "
        "something else is asked. Options of newllm.py change the settings of what is trained.")
    add, many = parser.add_argument, dict(nargs="+")
    add("--ask", nargs=2, metavar=("CHECKPOINT", "FILE"), help="questions with known answers")
    add("--wordings", nargs="*", metavar="FILE", help="learn a file by heart, ask those of another")
    add("--compare", metavar="FILE", help="models of the same size on new text")
    add("--original", nargs="?", const=newllm.SHIPPED, metavar="FILE", help="the original, too")
    add("--plot", type=Path, metavar="FOLDER", help="pictures of rows that --json kept")
    add("--models", **many, choices=KINDS, metavar="MODEL", help=f"of {', '.join(KINDS)}")
    add("--tokens", type=int, default=60_000, help="to train on")
    add("--dropouts", **many, type=float, default=[0.3, 0.5], help="to choose from")
    add("--epochs", **many, type=int, default=[16, 24], help="passes of Phase 1, to choose from")
    add("--seeds", **many, type=int, help="the first chooses the settings")
    add("--json", **many, default=[], metavar="FILE", help="to keep rows in, and to go on from")
    o, o.more = parser.parse_known_args()
    newllm.print = lambda *text, file=None, **_: file and print(*text, file=file)
    torch.set_flush_denormal(True)
    torch.backends.mha.set_fastpath_enabled(False)  # it ignores how far ALiBi lowers a score
    sys.stdout.reconfigure(line_buffering=True)
    with newllm.as_program("test_newllm.py", "interrupted; what --json kept will not run again"):
        o.device = newllm.pick_device(newllm.parse(o.more).device)
        on = torch.cuda.get_device_name() if o.device.type == "cuda" else f"{os.cpu_count()} cores"
        now = f"{on}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        kept = [json.loads(Path(path).read_text()) for path in o.json if Path(path).exists()]
        o.machines = sorted({now}.union(*(file["machines"] for file in kept)))
        o.rows = [row for file in kept for row in file["rows"]]
        tasks = [task for task in (ask, wordings, compare, original, plot)
                 if getattr(o, task.__name__) is not None]
        for task in tasks or [benchmark]:
            print(f"\n{task.__doc__}\n{now}")
            task(o)

if __name__ == "__main__":
    script()
