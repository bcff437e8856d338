"""New-LLM: a language model without attention, in one file you can read from top to bottom.

All that the model remembers of a text is one vector of fixed size, the state. A token changes it,
the next word is read from it, and it is handed on to the next token: a chat costs the same memory
and the same time per token after ten tokens and after a million. Training has two phases: Phase 1
learns the states without predicting words, Phase 2 keeps them fixed and learns to speak.

    python newllm.py --small        ten dialogues, word for word, on two CPU cores: 8 s in one run
                                    (AMD EPYC, torch 2.13.0, 2026-11-22)
    python chat.py                  chat with what was trained
    python newllm.py --help         every option; each is one field of Config, just below
    torchrun --nproc-per-node 8 newllm.py --large

The letters that the code and its comments use:

    B, T      dialogues in a batch, tokens in a dialogue
    V         vocabulary: GPT-2's 50,257 tokens + two for ChatML, padded to 50,304
              (the head chooses among those only that the training text contains)
    E, C, H   embed_dim, context_dim, hidden_dim
    x         embedded, normalised tokens                  (B, T, E)
    u         what they add to the first hidden layer      (B, T, H)
    s         the state that goes from token to token      (B, C)
    c         the context, LayerNorm(s): what is read      (B, C)
"""
import argparse
import builtins
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 1. Configuration: the command line is made from these fields, context_dim becomes --context-dim

def option(default, help, choices=None, least=None):
    """A field of Config: help gives the unit, `least` the smallest number allowed (default > 0)."""
    return field(default=default, metadata=dict(help=help, choices=choices, least=least))

@dataclass
class Config:
    """Every setting of a run. A preset changes some defaults, the command line any of them."""
    # data
    data: str = option("data/chats.jsonl", "ultrachat, a Hugging Face name, a .jsonl or .txt file")
    val_data: str = option("", "the same kinds; empty: the source's own, else every tenth dialogue")
    samples: int = option(10, "dialogues to train on; 0: all", least=0)
    val_samples: int = option(20, "dialogues to validate on, at most")
    max_len: int = option(512, "tokens after which a dialogue is cut", least=2)
    show_data: int = option(0, "dialogues to print, targets in another colour, and stop", least=0)
    cache: str = option("cache", "folder of tokenised data, contexts and GPT-2's embeddings")
    # model
    embeddings: str = option("auto", "auto, gpt2, learned, or a .safetensors file with wte.weight")
    embed_dim: int = option(256, "E of learned embeddings (GPT-2's have 768)")
    num_layers: int = option(1, "hidden layers of the context block, and of the token block")
    context_dim: int = option(128, "C, numbers in the state")
    hidden_dim: int = option(256, "H, units of a hidden layer")
    token_input_all_layers: bool = option(False, "feed the token to all layers, not just one")
    dropout: float = option(0.0, "share of the token block's units dropped in training", least=0)
    word_memory: float = option(0.0, "share of the next word's probability that a memory of the "
                                "words said gives, not the context; 0: no memory", least=0)
    cell: str = option("gated", "original has LayerNorm inside the loop", ("gated", "original"))
    solver: str = option("auto", "how states are found", ("auto", "parallel", "sequential"))
    tol: float = option(5e-5, "the solver stops when no state moves by more, in units of its size")
    max_sweeps: int = option(30, "sweeps after which it gives way to the token loop")
    # Phase 1
    iterations: int = option(60, "passes over the data; 0: contexts stay untrained", least=0)
    min_iterations: int = option(5, "passes before Phase 1 may stop early", least=0)
    phase1_learning_rate: float = option(2e-3, "AdamW's peak learning rate in Phase 1")
    phase1_batch_tokens: int = option(4096, "tokens per optimizer step, in whole dialogues")
    diversity: str = option("contrast", "what spreads contexts", ("contrast", "logdet", "norm"))
    diversity_weight: float = option(0.9, "w, 0 to 1, in (1 - w) change + w diversity", least=0)
    contrast_on: str = option("answers", "next words to tell apart", ("answers", "everything"))
    negatives: int = option(1023, "wrong next tokens to tell the right one from")
    negatives_power: float = option(0.0, "0: they come from the same batch; else from all of the "
                                    "text, drawn by their count to this power", least=0)
    contrast_temperature: float = option(0.1, "divides the cosines of the contrast")
    word_dropout: float = option(0.0, "share of the tokens hidden from the context block; falls to "
                                 "0 with the learning rate", least=0)
    phase1_watch: str = option("training", "whose contrast has to gain for Phase 1 to go on",
                               ("training", "held-out"))
    threshold: float = option(0.01, "a context that changes less, mean squared, has converged")
    # Phase 2
    epochs: int = option(40, "passes over the data")
    learning_rate: float = option(8e-3, "AdamW's peak learning rate in Phase 2")
    embedding_rate: float = option(1.0, "share of it for learned embeddings; they overfit first")
    batch_tokens: int = option(64, "tokens per optimizer step (targets, where states are cached)")
    joint: bool = option(False, "train the context block too, through the recurrence")
    patience: int = option(0, "epochs without gain until it stops; 0: none, last is best", least=0)
    stop_after: int = option(0, "epochs after which to save and stop, to be resumed", least=0)
    cache_gb: float = option(4.0, "GB for states; if they do not fit, each batch's are recomputed")
    # both phases, and the machine
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    warmup: int = option(10, "optimizer steps of linear warm-up", least=0)
    grad_clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(42, "seed of everything random", least=0)
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "outside the states", ("auto", "float32", "bfloat16", "float16"))
    out: str = option("checkpoints", "folder of the checkpoints")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    scaling: str = option("", "sizes such as 50,100,200: train a model on each, fit a power law")
    tensorboard: str = option("", "folder for TensorBoard's logs")

PRESETS = {
    "small": {},  # the defaults: ten dialogues, learnt by heart
    "medium": dict(  # by heart too: nothing else makes so few dialogues speak in whole sentences
        data="ultrachat", samples=100, val_samples=100, num_layers=2, context_dim=256,
        hidden_dim=512, iterations=8, phase1_watch="held-out", epochs=60, learning_rate=3e-3,
        batch_tokens=512),
    "large": dict(  # the best epoch on dialogues it has not seen
        data="ultrachat", samples=1000, val_samples=100, max_len=1024, num_layers=4,
        context_dim=512, hidden_dim=1024, dropout=0.1, word_memory=0.08, iterations=16, epochs=10,
        patience=3, contrast_on="everything", negatives_power=0.5, word_dropout=0.5,
        phase1_watch="held-out", learning_rate=2e-3, embedding_rate=0.2, batch_tokens=8192,
        weight_decay=0.01),
}
MAY_CHANGE = {"out", "resume", "epochs", "stop_after", "patience", "device", "cache", "tensorboard"}
PHASE_2_ONLY = MAY_CHANGE | {  # what Phase 1 does not depend on (the data's content it does)
    "learning_rate", "embedding_rate", "batch_tokens", "dropout", "word_memory", "dtype",
    "show_data", "data", "val_data", "joint"}

class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""

def check(config: Config) -> Config:
    """The config itself, or UserError where a value makes no sense."""
    for f in fields(config):
        value, least = getattr(config, f.name), f.metadata["least"]
        if f.type in (int, float) and not (value > 0 if least is None else value >= least):
            raise UserError(f"{flag_of(f.name)} {value}: give a number "
                            + ("above 0" if least is None else f"of at least {least}"))
    if max(config.dropout, config.word_dropout, config.word_memory) >= 1:
        raise UserError("--dropout, --word-dropout and --word-memory must be below 1")
    if config.diversity_weight > 1:
        raise UserError(f"--diversity-weight {config.diversity_weight}: give a number up to 1")
    if not Path(config.data).name:
        raise UserError(f"--data {config.data!r}: give a file, or a dataset's name")
    if config.seed >= 2 ** 31:
        raise UserError(f"--seed {config.seed}: give a number below 2,147,483,648")
    if config.cell == "original" and config.solver == "parallel":
        raise UserError("--cell original has no parallel solver: LayerNorm inside the loop keeps "
                        "errors alive, sweeps would not settle; use --solver sequential")
    if config.scaling and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)+", config.scaling):
        raise UserError(f"--scaling {config.scaling}: give two sizes or more, such as 50,100,200")
    return config

def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")

def parse(argv: list[str]) -> tuple[Config, dict]:
    """The command line as a Config, and what --resume must find or change: the values that it
    gives, and those of the preset that may not change."""
    parser = argparse.ArgumentParser("newllm.py", allow_abbrev=False, description="Train New-LLM.")

    def fail(message):
        raise UserError(f"{message} (python newllm.py --help lists the options)")
    parser.error = fail
    presets = parser.add_mutually_exclusive_group()
    for name, changes in PRESETS.items():
        listed = ", ".join(f"{k} {v}" for k, v in changes.items())
        presets.add_argument(f"--{name}", dest="preset", action="store_const", const=name,
                             default=argparse.SUPPRESS, help=f"preset: {listed or 'the defaults'}")
    for f in fields(Config):
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(type=f.type, choices=f.metadata["choices"], metavar=f.name.upper()))
        default = "none" if f.default == "" else f.default
        parser.add_argument(flag_of(f.name), default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['help']} (default: {default})")
    given = vars(parser.parse_args(argv))
    preset = PRESETS[given.pop("preset", "small")]
    config = check(replace(Config(), **preset | given))
    return config, {k: v for k, v in preset.items() if k not in MAY_CHANGE} | given

# ------------------------------------------------------------------------------------------------
# 2. Processes and files: what the rest of the program stands on

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

@contextlib.contextmanager
def first_on_its_machine():
    """The first process of a machine goes through alone; the others follow and find its files."""
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()

def say(text: str):
    """Print, on the first of several processes only."""
    if rank() == 0:
        print(text, flush=True)

def in_notebook() -> bool:
    return hasattr(builtins, "__IPYTHON__")

def quiet() -> bool:
    """No progress bars into files, nor from a second process."""
    return rank() > 0 or not (sys.stderr.isatty() or in_notebook())

def global_sum(x: Tensor) -> Tensor:
    """Sum over all processes; the gradient flows into this process's share only."""
    if world_size() == 1:
        return x
    everything = x.detach().clone()
    dist.all_reduce(everything)
    return x + (everything - x.detach()) if x.requires_grad else everything

def same_everywhere(model: nn.Module):
    """All processes begin with the weights of the first, as DistributedDataParallel has it."""
    if world_size() > 1:
        tensors = model.state_dict().values()
        size = torch.tensor(sum(t.numel() for t in tensors), device=next(iter(tensors)).device)
        sizes = [torch.zeros_like(size) for _ in range(world_size())]
        dist.all_gather(sizes, size)
        if any(s != size for s in sizes):
            raise UserError("the machines built different models, some could reach GPT-2's "
                            "embeddings and some not; give --embeddings gpt2 or learned")
        for t in tensors:
            dist.broadcast(t, 0)

def cause(error: Exception) -> str:
    """The first line of an error, short enough for ours."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:150]

def digest(thing) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]

def flat(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    """{"a": {"b": tensor}} -> {"a/b": tensor}, as .safetensors files have it."""
    return {name: t for key, value in tree.items() for name, t in
            (flat(value, f"{prefix}{key}/") if isinstance(value, dict)
             else {f"{prefix}{key}": value}).items()}

def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under prefix/, by the rest of their names."""
    return {name[len(prefix) + 1:]: t for name, t in tensors.items()
            if name.startswith(prefix + "/")}

def save_tensors(path: Path, tree: dict, notes: dict):
    """Write a .safetensors file, whole or not at all. Raises UserError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().cpu().contiguous() for name, t in flat(tree).items()},
                  temporary, metadata=dict(newllm=json.dumps(notes)))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({cause(e)}); free some space, or name another "
                        f"folder with --out or --cache") from None

def load_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """What save_tensors() wrote: tensors whose names begin with prefix, and notes. Runs no code."""
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["newllm"])
            return {name: file.get_tensor(name) for name in file.keys()
                    if name.startswith(prefix)}, notes
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is missing, damaged or not New-LLM's ({cause(e)}); delete it or "
                        f"name another") from None

# ------------------------------------------------------------------------------------------------
# 3. Data: dialogues in; token ids, and a mask of the assistant's words, out

IM_START, IM_END, VOCAB_USED, VOCAB = 50257, 50258, 50259, 50304
ROLES = dict(user="user", human="user", assistant="assistant", gpt="assistant", system="system")
if Path("data/0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").exists():  # the name tiktoken looks for
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path("data").resolve()))

class Dialogue(NamedTuple):
    ids: Tensor   # (T,) int32
    mask: Tensor  # (T,) bool, True on the assistant's text and its <|im_end|>

class Tokenizer:
    """GPT-2's byte-pair encoding (r50k_base of https://github.com/openai/tiktoken) and ChatML."""

    def __init__(self):
        import tiktoken
        try:
            base = tiktoken.get_encoding("r50k_base")
        except Exception as e:  # whatever the network or the cache folder does
            raise UserError(f"tiktoken cannot load r50k_base ({cause(e)}); go online once, or "
                            f"start in the folder that has newllm.py's data/") from None
        special = base._special_tokens | {"<|im_start|>": IM_START, "<|im_end|>": IM_END}
        self.bpe = tiktoken.Encoding("r50k_chatml", pat_str=base._pat_str, special_tokens=special,
                                     mergeable_ranks=base._mergeable_ranks)

    def message(self, role: str, text: str) -> tuple[list[int], list[bool]]:
        """<|im_start|>role⏎text<|im_end|>⏎ as ids, and which of them are targets.

        encode_ordinary() knows no special tokens: typing "<|im_end|>" gives its ten characters.
        """
        head, tail = self.head(role), self.bpe.encode_ordinary("\n")
        body, target = self.bpe.encode_ordinary(text) + [IM_END], role == "assistant"
        return head + body + tail, [False] * len(head) + [target] * len(body) + [False] * len(tail)

    def head(self, role: str) -> list[int]:
        return [IM_START] + self.bpe.encode_ordinary(role + "\n")

    def question(self, text: str) -> list[int]:
        """A user's message, and the head of the answer that the model is to write."""
        return self.message("user", text)[0] + self.head("assistant")

    def text(self, ids: list[int]) -> str:
        return self.bpe.decode(ids, errors="replace")

def messages_of(record: dict, where: str) -> list[tuple[str, str]]:
    """(role, text) pairs of a record with messages (UltraChat) or conversations (ShareGPT)."""
    try:
        turns = record["messages"] if "messages" in record else record["conversations"]
        pairs = [(turn["role"], turn["content"]) if "role" in turn else
                 (turn["from"], turn["value"]) for turn in turns]
        answers = [text for role, text in pairs if text.strip() and
                   ROLES.get(role) == "assistant"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: no list called messages or conversations, of a role and a text "
                        f"each") from None
    if unknown := [role for role, _ in pairs if role not in ROLES]:
        raise UserError(f"{where}: unknown role {unknown[0]!r}; use {', '.join(ROLES)}")
    if not answers:
        raise UserError(f"{where}: " + ("no assistant message, so nothing to learn from" if pairs
                                        else "an empty dialogue"))
    return [(ROLES[role], text) for role, text in pairs]

def is_file(name: str) -> bool:
    """A local file, existing or meant; anything else is a name on the Hugging Face hub."""
    return Path(name).suffix in (".jsonl", ".json", ".txt") or Path(name).exists()

def read_file(path: Path) -> Iterator[str | list[tuple[str, str]]]:
    """The dialogues of a .jsonl file; of a .txt file the whole text, as one string."""
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{path}: unknown kind of file; give a .jsonl or a .txt file")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); give a text file") from None
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}); name an existing file") from None
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as e:
                raise UserError(f"{path} line {number} is not JSON: {e}") from None
            yield messages_of(record, f"{path} line {number}")

def read_hub(name: str, splits: tuple[str, ...]) -> Iterator[list[tuple[str, str]]]:
    """Dialogues of a Hugging Face dataset's first split of these, streamed as far as is read."""
    from huggingface_hub import HfApi
    name = "HuggingFaceH4/ultrachat_200k" if name == "ultrachat" else name
    try:
        HfApi().dataset_info(name, timeout=5)  # datasets alone would go on trying for half a minute
        import datasets
        split = next((s for s in splits if s in datasets.get_dataset_split_names(name)), None)
        stream = datasets.load_dataset(name, split=split, streaming=True) if split else ()
        for number, record in enumerate(stream, 1):
            try:
                yield messages_of(record, f"{name}, {split}, record {number}")
            except UserError:
                if number == 1:  # a wrong dataset; later on, one bad record among thousands
                    raise
    except UserError:
        raise
    except Exception as e:  # whatever the network does
        raise UserError(f"cannot read dataset {name} ({cause(e)}); offline, use the shipped "
                        f"dialogues: --data data/chats.jsonl") from None

def tokenise(source, tokenizer: Tokenizer, max_len: int, counts: dict) -> Iterator[Dialogue]:
    """Dialogues as ids and masks; counts what max_len cut, and what was left without a target."""
    for item in tqdm(source, "tokenising", unit=" dialogues", disable=quiet()):
        if isinstance(item, str):  # plain text: pieces of max_len tokens, every token a target
            ids = torch.tensor(tokenizer.bpe.encode_ordinary(item), dtype=torch.int32)
            yield from (Dialogue(part, torch.ones(len(part), dtype=torch.bool))
                        for part in ids.split(max_len) if len(part) > 1)
            continue
        messages = [tokenizer.message(role, text) for role, text in item]
        ids, mask = (list(itertools.chain(*column)) for column in zip(*messages))
        counts["cut"] += len(ids) > max_len
        if any(mask[:max_len]):
            yield Dialogue(torch.tensor(ids[:max_len], dtype=torch.int32),
                           torch.tensor(mask[:max_len]))
        else:
            counts["dropped"] += 1

def prepare(config: Config, tokenizer: Tokenizer) -> tuple[list[Dialogue], list[Dialogue]]:
    """The dialogues to train on and to validate on; none is in both. Tokenised data is cached.

    Raises UserError where a source is missing, broken or empty.
    """
    beside = Path(config.data).with_name(Path(config.data).stem + "_val.jsonl")
    held_out = config.val_data or (str(beside) if is_file(config.data) and beside.exists() else "")
    try:
        content = [Path(name).suffix + hashlib.sha256(Path(name).read_bytes()).hexdigest()
                   if Path(name).is_file() else name for name in (config.data, held_out)]
    except OSError as e:
        raise UserError(f"cannot read {e.filename} ({cause(e)}); see its permissions") from None
    path = Path(config.cache) / "tokens-{}.safetensors".format(
        digest([content, config.samples, config.val_samples, config.max_len]))
    with first_on_its_machine():
        if not path.exists():
            save_tensors(path, *tokens_of(config, held_out, tokenizer))
    tensors, notes = load_tensors(path)
    lengths, n = tensors["lengths"].tolist(), notes["train"]
    both = [Dialogue(*pair)
            for pair in zip(tensors["ids"].split(lengths), tensors["mask"].split(lengths))]
    say(f"data: {n} dialogues of {config.data}, {sum(lengths[:n]):,} tokens, {targets(both[:n]):,} "
        f"of them targets; {len(both) - n} held out; {notes['cut']} cut at {config.max_len} "
        f"tokens, {notes['dropped']} dropped without a target")
    return both[:n], both[n:]

def tokens_of(config: Config, held_out: str, tokenizer: Tokenizer) -> tuple[dict, dict]:
    """What prepare() caches: all tokens in a row, their masks, lengths; how many are for training.
    """
    counts = dict(cut=0, dropped=0)

    def read(name, splits, limit):
        source = read_file(Path(name)) if is_file(name) else read_hub(name, splits)
        dialogues = tokenise(source, tokenizer, config.max_len, counts)
        return list(itertools.islice(dialogues, limit or None))

    val, limit = [], config.samples
    if held_out or not is_file(config.data):
        val = read(held_out or config.data, ("test_sft", "validation", "test"), config.val_samples)
    train = read(config.data, ("train_sft", "train"),
                 limit and limit + (0 if val else limit // 9 + 1))
    if not val:  # every tenth, or the last if there are fewer
        last = min(9, len(train) - 1)
        train, val = [d for i, d in enumerate(train) if i % 10 != last], train[last::10]
    train = train[:limit or None]
    seen = {d.ids.numpy().tobytes() for d in train}
    val = [d for d in val if d.ids.numpy().tobytes() not in seen][:config.val_samples]
    if not train or not val:
        raise UserError(f"{config.data}: {len(train)} dialogues to train on and {len(val)} others "
                        f"to validate on, one of each is needed; see --val-data and --max-len")
    both = train + val
    tensors = dict(ids=torch.cat([d.ids for d in both]), mask=torch.cat([d.mask for d in both]),
                   lengths=torch.tensor([len(d.ids) for d in both]))
    return tensors, counts | dict(train=len(train))

def targets(dialogues: list[Dialogue]) -> int:
    return sum(int(d.mask[1:].sum()) for d in dialogues)

# ------------------------------------------------------------------------------------------------
# 4. The contexts: one cell, walked token by token or solved for all tokens at once

class Cell(nn.Module):
    """One step of the recurrence: (u_t, s_{t-1}) -> s_t.

    s_t = f * s_{t-1} + (1 - f) * i * d keeps |s| <= 1 and forgets, so errors die out; LayerNorm is
    left to the read-out. kind="original" has it in the loop: s_t = LayerNorm(f * s_{t-1} + i * d).
    """

    def __init__(self, E: int, C: int, H: int, num_layers: int, token_input_all_layers: bool,
                 kind: str):
        super().__init__()
        self.kind, self.C = kind, C
        self.token_in = nn.Linear(E, H * (num_layers if token_input_all_layers else 1))
        self.state_in = nn.Linear(C, H, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(H, H) for _ in range(num_layers - 1))
        self.gates = nn.Linear(H, 3 * C)
        nn.init.orthogonal_(self.state_in.weight, gain=0.5)
        nn.init.orthogonal_(self.gates.weight, gain=0.7)
        nn.init.zeros_(self.gates.bias)
        with torch.no_grad():  # units that forget at once next to units that remember for long
            self.gates.bias[:C] = torch.linspace(-1, 4, C)

    def recurrent(self) -> list[nn.Parameter]:
        """All parameters but those of token_in, whose work is done before the recurrence."""
        return [p for name, p in self.named_parameters() if not name.startswith("token_in")]

    def forward(self, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, H or H * num_layers), s (B, C) -> the next state (B, C), the forget gate (B, C)."""
        first, *others = u.split(self.state_in.out_features, dim=-1)
        a = F.silu(first + self.state_in(s))
        for k, layer in enumerate(self.hidden):
            a = F.silu(layer(a) + (others[k] if others else 0))
        f, i, d = self.gates(a).chunk(3, dim=-1)
        f, i, d = torch.sigmoid(f), torch.sigmoid(i), torch.tanh(d)
        if self.kind == "original":
            return F.layer_norm(f * s + i * d, (self.C,)), f
        return torch.addcmul((1 - f) * i * d, f, s), f

def walk(cell: Cell, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token: u (B, T, ·), s (B, C) -> states (B, T, C); the product of forget
    gates (B, C), which solve() needs."""
    states, kept = [], torch.ones_like(s)
    for u_t in u.unbind(1):
        s, f = cell(u_t, s)
        states.append(s)
        kept = kept * f
    return torch.stack(states, 1), kept

def scan(f: Tensor, b: Tensor) -> Tensor:
    """y_t = f_t * y_{t-1} + b_t, y_0 = 0, for all t of (B, T, C) in log2(T) steps.

    The doubling scan: Hillis & Steele, Data Parallel Algorithms, CACM 1986.
    """
    k = 1
    while k < f.shape[1]:
        b = torch.cat((b[:, :k], torch.addcmul(b[:, k:], f[:, k:], b[:, :-k])), 1)
        f = torch.cat((f[:, :k], f[:, k:] * f[:, :-k]), 1)
        k *= 2
    return b

def chunked(x: Tensor, L: int) -> Tensor:
    """(B, T, D) -> (B * n, L, D): n chunks of L tokens, the last filled up with zeros."""
    B, T, D = x.shape
    n = -(-T // L)
    return F.pad(x, (0, 0, 0, n * L - T)).reshape(B * n, L, D)

def chunk_length(T: int, device: torch.device) -> int:
    """Tokens per chunk: about sqrt(T) / 2 on a CPU; few on a GPU, where every step is a launch."""
    return 16 if device.type == "cuda" else 2 ** max(4, math.ceil(math.log2(T) / 2) - 1)

def solve(cell: Cell, u: Tensor, s0: Tensor, guess: Optional[Tensor] = None, tol: float = 5e-5,
          max_sweeps: int = 30) -> tuple[Tensor, Tensor, int]:
    """The states that walk() gives, for all chunks of the text side by side.

    Cut the text into n chunks and guess the state before each. A sweep walks all of them at once,
    as one batch of B * n rows. Where a chunk ends elsewhere than the next was guessed to start, the
    guesses are corrected together: start_{j+1} = end_j + kept_j * (correction of start_j), a linear
    recurrence, solved by scan(). Newton's method would use each chunk's full Jacobian; the product
    of its forget gates is the cheap diagonal part (Lim et al., DEER, ICLR 2024; Gonzalez et al.,
    NeurIPS 2024). That changes how many sweeps it takes, not where it ends, which is the walk.

    Args:
        u: (B, T, ·) tokens' share of the first layer; s0: (B, C) state before the first token.
        guess: (B, T, C) states to start from, such as the last iteration's; zeros if None.
    Returns:
        states (B, T, C); the chunks' starts (B, n, C); sweeps taken, 0 if none of max_sweeps
        reached tol, in which case the states come from walk().
    """
    (B, T, _), C, L = u.shape, s0.shape[1], chunk_length(u.shape[1], u.device)
    chunks = chunked(u, L)
    n = len(chunks) // B
    starts = s0.new_zeros(B, n, C)
    if guess is not None:
        starts[:, 1:] = guess[:, L - 1:(n - 1) * L:L]
    starts[:, 0] = s0
    for sweep in range(1, max_sweeps + 1):
        states, kept = walk(cell, chunks, starts.view(B * n, C))
        kept, ends = kept.view(B, n, C), states[:, -1].view(B, n, C)
        change = scan(kept[:, :-1], ends[:, :-1] - starts[:, 1:])
        starts[:, 1:] += change
        size = starts.std(-1, keepdim=True).clamp(min=1e-3)[:, 1:]  # what is read is LayerNorm(s)
        if n == 1 or (change / size).abs().max() <= tol:
            return states.view(B, n * L, C)[:, :T], starts, sweep
    states = walk(cell, u, s0)[0]
    starts[:, 1:] = states[:, L - 1:(n - 1) * L:L]
    return states, starts, 0

class ParallelStates(torch.autograd.Function):
    """solve() with its gradient: the same recurrence, run from right to left.

    The loss reaches the start of chunk j through the chunk itself (inside_j) and through all later
    ones: m_j = inside_j + J_j^T m_{j+1}, J_j being the Jacobian of the chunk's end. With kept_j in
    place of J_j this is a scan; autograd supplies the difference, sweep by sweep.
    """

    @staticmethod
    def forward(ctx, cell, u, s0, guess, tol, max_sweeps, *parameters):
        states, starts, sweeps = solve(cell, u, s0, guess, tol, max_sweeps)
        ctx.cell, ctx.max_sweeps = cell, max_sweeps
        ctx.save_for_backward(u, starts)
        return states, sweeps

    @staticmethod
    def backward(ctx, grad, _):
        u, starts = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        (B, n, C), L = starts.shape, chunk_length(u.shape[1], u.device)
        with torch.enable_grad():
            states, kept = walk(ctx.cell, chunked(u, L), starts.view(B * n, C))
        grad, kept = chunked(grad, L), kept.detach().view(B, n, C)
        inside = torch.autograd.grad(states, starts, grad, retain_graph=True)[0]
        m, ends = inside, torch.zeros_like(grad)
        for _ in range(ctx.max_sweeps if n > 1 else 0):
            later = F.pad(m[:, 1:], (0, 0, 0, 1))  # what arrives at each chunk's end
            ends[:, -1] = later.reshape(B * n, C)
            through = torch.autograd.grad(states, starts, ends, retain_graph=True)[0]
            new = scan(kept.flip(1), (inside + through - kept * later).flip(1)).flip(1)
            change, m = (new - m).norm(), new
            if change <= 1e-3 * m.norm():
                break
        ends[:, -1] = F.pad(m[:, 1:], (0, 0, 0, 1)).reshape(B * n, C)
        gradients = torch.autograd.grad(states, (u, *ctx.cell.recurrent()), grad + ends)
        return None, gradients[0], m[:, 0], None, None, None, *gradients[1:]

# ------------------------------------------------------------------------------------------------
# 5. The model: the context block, the token block, the output head; how it writes

class HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies of h W^T, and how many were right, without the (N, V) logits.

    h (N, E), weight (V, E), targets (N,) -> loss (), correct (). Loss and gradient are computed
    chunk by chunk of rows in one buffer, at most 64 MiB, on a CPU a few rows at a time, which stay
    in its cache. The idea is that of Liger Kernel's fused linear cross entropy
    (https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(ctx, h, weight, targets, learning=True):
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        rows = max(1, 2 ** 24 // len(weight))
        few = max(16, 2 ** 20 // len(weight)) if kind == "cpu" else rows
        W, wants_weight = weight.to(dtype), learning and ctx.needs_input_grad[1]
        scores = torch.empty(min(rows, len(h)), len(weight), dtype=dtype, device=h.device)
        loss, correct = h.new_zeros((), dtype=torch.float32), targets.new_zeros(())
        grad_h, grad_W = torch.empty_like(h), torch.zeros_like(weight) if wants_weight else None
        for h_part, y_part, grad in zip(h.split(rows), targets.split(rows), grad_h.split(rows)):
            h_part = h_part.to(dtype)
            g = torch.mm(h_part, W.t(), out=scores[:len(y_part)])
            for g_few, y in zip(g.split(few), y_part.split(few)):
                z = g_few.float()
                correct += (z.argmax(-1) == y).sum()
                torch.log_softmax(z, -1, out=z)
                loss -= z.gather(1, y[:, None]).sum()
                if learning:  # softmax minus one-hot is the gradient, and takes the scores' place
                    z.exp_()[torch.arange(len(y), device=y.device), y] -= 1
                    g_few.copy_(z)
            if learning:
                grad.copy_(g @ W)
            if wants_weight and dtype == weight.dtype:
                grad_W.addmm_(g.t(), h_part)
            elif wants_weight:  # sums of bfloat16 products stay in float32
                grad_W += g.t() @ h_part
        ctx.save_for_backward(grad_h, grad_W)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad, _):
        grad_h, grad_W = ctx.saved_tensors
        return grad_h.mul_(grad), None if grad_W is None else grad_W.mul_(grad), None, None

class WordMemory(nn.Module):
    """Which words were said, and what followed them: 2N + 1 numbers for N - 1 words.

    A context knows what a text is about, but hardly which of thousands of names it was; and in a
    chat names return. Of each word the memory holds how often it was said, fading by 1 % a token,
    and which word came after it the last time; and it holds the last word of all. Word 0 is none.
    What it recalls is a cache language model (Kuhn & De Mori 1990).
    """

    def __init__(self, known: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(known + 1))
        self.weight[0] = 0

    def weigh(self, rows: Tensor):
        """How much each word matters: min(1, sqrt(0.0005 / its share of the text, rows (M,))), as
        word2vec keeps words (Mikolov et al. 2013). Words without a row do not matter."""
        count = torch.bincount(rows, minlength=len(self.weight))[:len(self.weight) - 1]
        self.weight[1:] = (5e-4 * len(rows) / count).sqrt().clamp(max=1)

    def forward(self, rows: Tensor, memory: Optional[Tensor] = None) -> Iterator[Tensor]:
        """The memory (B, 2N + 1) after each token of rows (B, T) of the table of embeddings."""
        N = len(self.weight)
        if memory is None:
            memory = self.weight.new_zeros(len(rows), 2 * N + 1)
        for x in torch.where(rows < N - 1, rows + 1, 0).split(1, dim=1):
            said, after, last = memory.split((N, N, 1), dim=-1)
            said = (0.99 * said).scatter_add(1, x, self.weight[x])
            after = after.scatter(1, last.long(), x.to(after))
            after[:, 0] = 0
            memory = torch.cat((said, after, x.to(last)), dim=-1)
            yield memory

    def recall(self, memory: Tensor) -> Tensor:
        """memory (..., 2N + 1) -> the probability (..., N - 1) that each word is next: after a word
        of weight w that was said before, w for what followed it then, and the rest for all other
        words that were said, by their weights."""
        N = len(self.weight)
        said, after, last = memory.split((N, N, 1), dim=-1)
        last = last.long()
        follower, said = after.gather(-1, last).long(), said.scatter(-1, last, 0.0)
        again = said / said.sum(-1, keepdim=True).clamp(min=1e-9)
        w = self.weight[last] * (follower > 0)
        return ((1 - w) * again).scatter_add(-1, follower, w)[..., 1:]

class Output(NamedTuple):
    loss: Optional[Tensor]
    logits: Optional[Tensor]  # (B, T, V)
    state: Tensor             # (B, C), after the last token; with a word memory (B, C + 2N + 1)

class NewLLM(nn.Module, PyTorchModelHubMixin):
    """Context block and token block over one table of embeddings, which also is the output head.

    embeddings: "shared" by both blocks; "frozen", GPT-2's, shared and not trained; "separate", the
    context block reads a table of its own, which frozen contexts need where embeddings are learned,
    for Phase 2 goes on learning those of the head.

    known: how many tokens the head can say; 0: all of them. know() says which. The others share the
    probability `unseen` in evaluation. They read as GPT-2 has them, or as zeros: there is no row
    for them in learned tables.

    word_memory: the share of the probabilities that WordMemory gives, but in training. The state
    that is handed on from call to call then is (B, C + 2N + 1), N = known + 1, not (B, C).
    """

    def __init__(self, vocab_size: int = VOCAB, embed_dim: int = 256, context_dim: int = 128,
                 hidden_dim: int = 256, num_layers: int = 1, token_input_all_layers: bool = False,
                 dropout: float = 0.0, cell: str = "gated", solver: str = "auto", tol: float = 5e-5,
                 max_sweeps: int = 30, embeddings: str = "shared", known: int = 0,
                 word_memory: float = 0.0):
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        V, E, C, H = vocab_size, embed_dim, context_dim, hidden_dim
        self.solver, self.tol, self.max_sweeps, self.sweeps = solver, tol, max_sweeps, 0
        self.known, self.word_memory = known or V, word_memory
        size = (known + 1, E, known) if known and embeddings != "frozen" else (V, E)
        self.embed = nn.Embedding(*size).requires_grad_(embeddings != "frozen")
        self.context_embed = nn.Embedding(*size) if embeddings == "separate" else None
        for table in filter(None, (self.embed, self.context_embed)):
            nn.init.normal_(table.weight[:self.known], std=0.02)
        self.register_buffer("row_of", torch.arange(V).clamp(max=size[0] - 1))
        self.register_buffer("unseen", torch.tensor(0.01))
        self.memory = WordMemory(self.known) if word_memory else None
        self.cell = Cell(E, C, H, num_layers, token_input_all_layers, cell)
        self.again = E if token_input_all_layers else 0
        inputs = [E + C] + [H + self.again] * (num_layers - 1)
        self.hidden = nn.ModuleList(nn.Linear(width, H) for width in inputs)
        self.out, self.norm, self.dropout = nn.Linear(H, E), nn.LayerNorm(E), nn.Dropout(dropout)

    def know(self, text: Tensor, spoken: Tensor):
        """The `known` different tokens of the text, ids (N,), get the first rows. The others get
        the probability that the next token is a new one, estimated by the share of tokens that
        occur once (Good 1953) in what is spoken, ids (M,)."""
        there = torch.zeros_like(self.row_of, dtype=torch.bool).index_fill(0, text, True)
        rows = torch.arange(len(there), device=text.device).clamp(max=len(self.embed.weight) - 1)
        self.row_of[there], self.row_of[~there] = rows[:self.known], rows[self.known:]
        once = (torch.bincount(spoken) == 1).sum().clamp(min=1)
        self.unseen.fill_(once / (len(spoken) + 1))
        if self.memory:
            self.memory.weigh(self.row_of[text])

    def context_table(self) -> nn.Embedding:
        """The embeddings that the context block reads."""
        return self.context_embed or self.embed

    def embedded(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        """x: ids (...) -> (..., E), normalised."""
        return F.layer_norm(table(self.row_of[ids]), (table.embedding_dim,))

    def token_share(self, input_ids: Tensor, shown: Optional[Tensor] = None) -> Tensor:
        """u: what the tokens (B, T) add to the context block's first layer; no recurrence in it.
        Where shown (B, T) is False, nothing is read."""
        x = self.embedded(self.context_table(), input_ids)
        return self.cell.token_in(x if shown is None else x * shown[..., None])

    def contexts(self, states: Tensor) -> Tensor:
        """c = LayerNorm(s): states (..., C) -> contexts (..., C) of zero mean and unit variance."""
        return F.layer_norm(states, states.shape[-1:])

    def states(self, input_ids: Tensor, state: Optional[Tensor] = None,
               guess: Optional[Tensor] = None, shown: Optional[Tensor] = None) -> Tensor:
        """Context block: ids (B, T), state or None for zeros -> states (B, T, C), float32.

        guess (B, T, C): as in solve(); shown (B, T): as in token_share(). solver="auto": on a CPU
        the loop wins once some dialogues are walked side by side (table 1 of python
        test_newllm.py); on a GPU every one of its steps is a launch.
        """
        with torch.autocast(input_ids.device.type, enabled=False):
            u, C = self.token_share(input_ids, shown), self.cell.C
            s = u.new_zeros(len(u), C) if state is None else state[:, :C].float()
            wanted = self.solver == "parallel" or self.solver == "auto" and (u.is_cuda
                                                                             or len(u) <= 4)
            self.sweeps = 0
            if not wanted or self.cell.kind == "original" or u.shape[1] <= 32:
                return walk(self.cell, u, s)[0]
            states, self.sweeps = ParallelStates.apply(self.cell, u, s, guess, self.tol,
                                                       self.max_sweeps, *self.cell.recurrent())
            if self.sweeps == 0:
                say(f"solver: {self.max_sweeps} sweeps did not reach {self.tol}; "
                    f"walked token by token")
            return states

    def hidden_states(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """The token block: ids (...), states (..., C) -> (..., E), ready for the output head.

        h = LayerNorm(x + FNN([x, c])), with dropout in between and after
        """
        x = self.embedded(self.embed, input_ids)
        a = torch.cat((x, self.contexts(states)), dim=-1)
        for k, layer in enumerate(self.hidden):
            a = torch.cat((a, x), dim=-1) if k and self.again else a
            a = self.dropout(F.silu(layer(a)))
        return self.dropout(self.norm(x + self.out(a).float()))

    def read(self, input_ids: Tensor, state: Optional[Tensor] = None) -> Tensor:
        """The state after more tokens (B, T), all that is handed on from call to call."""
        s = self.states(input_ids, state)[:, -1]
        if self.memory is None:
            return s
        for memory in self.memory(self.row_of[input_ids], self.remembered(state)):
            pass
        return torch.cat((s, memory), dim=-1)

    def remembered(self, state: Optional[Tensor]) -> Optional[Tensor]:
        """The word memory's part of a state."""
        return None if state is None else state[:, self.cell.C:]

    def logits(self, h: Tensor, recalled: Optional[Tensor] = None) -> Tensor:
        """The output head: h (..., E) -> (..., V), mixed with what is recalled (..., known)."""
        z = F.linear(h, self.embed.weight[:self.known])
        if recalled is not None:
            z = torch.logaddexp(z.float().log_softmax(-1) + math.log(1 - self.word_memory),
                                recalled.log() + math.log(self.word_memory))
        if self.known == len(self.row_of):
            return z
        each = self.unseen / (1 - self.unseen) / (len(self.row_of) - self.known)
        z = torch.cat((z, torch.logsumexp(z.float(), -1, keepdim=True) + each.log()), -1)
        return z[..., self.row_of.clamp(max=self.known)]

    def cross_entropy(self, h: Tensor, y: Tensor, recalled: Optional[Tensor] = None
                      ) -> tuple[Tensor, Tensor]:
        """That of logits() for h (N, E) and tokens y (N,), summed, and how many were right.

        In training, where no token is unknown, they are not charged for what the unknown get.
        """
        if recalled is not None:
            z = self.logits(h, recalled)
            return F.cross_entropy(z, y, reduction="sum"), (z.argmax(-1) == y).sum()
        y, more = self.row_of[y], 0.0
        if self.known < len(self.row_of):
            there, others = y < self.known, len(self.row_of) - self.known
            h, y = h[there], y[there]
            if not self.training:
                more = -((~there).sum() * (self.unseen / others).log() +
                         there.sum() * torch.log1p(-self.unseen))
        loss, correct = HeadLoss.apply(h, self.embed.weight[:self.known], y,
                                       torch.is_grad_enabled())
        return loss + more, correct

    def forward(self, input_ids: Tensor, labels: Optional[Tensor] = None,
                state: Optional[Tensor] = None) -> Output:
        """ids (B, T) -> logits (B, T, V) and the state after the last token.

        labels (B, T), as Hugging Face has them: not shifted, -100 is ignored. With them the mean
        loss is returned and no logits are made. state goes on where another call ended.
        """
        states, recalled = self.states(input_ids, state), None
        h, end = self.hidden_states(input_ids, states), states[:, -1]
        if self.memory:
            memories = [*self.memory(self.row_of[input_ids], self.remembered(state))]
            end = torch.cat((end, memories[-1]), dim=-1)
            recalled = None if self.training else self.memory.recall(torch.stack(memories, 1))
        if labels is None:
            return Output(None, self.logits(h, recalled), end)
        rows = labels[:, 1:] != -100
        loss, _ = self.cross_entropy(h[:, :-1][rows], labels[:, 1:][rows],
                                     None if recalled is None else recalled[:, :-1][rows])
        return Output(loss / rows.sum().clamp(min=1), None, end)

    def scores(self, last_ids: Tensor, state: Tensor) -> Tensor:
        """Logits (B, V) of the token after last_ids (B,), of tokens that the model can say."""
        recalled = self.memory.recall(self.remembered(state)) if self.memory else None
        h = self.hidden_states(last_ids, state[:, :self.cell.C])
        scores = self.logits(h, recalled).float()
        scores[:, IM_START:IM_END] = scores[:, VOCAB_USED:] = -math.inf  # nobody says these
        return scores.masked_fill(self.row_of >= self.known, -math.inf)

    @torch.no_grad()
    def stream(self, input_ids: Tensor, max_new_tokens: int = 100, do_sample: bool = False,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               repetition_penalty: float = 1.0, state: Optional[Tensor] = None
               ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (next token (B,), the state that has read all before it), one at a time."""
        seen = torch.zeros(len(input_ids), VOCAB, dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            seen.scatter_(1, input_ids, True)
            seen[:, IM_START:] = False  # answers could not end if <|im_end|> were punished
            state = self.read(input_ids, state)
            scores = self.scores(input_ids[:, -1], state)
            if repetition_penalty != 1:
                punished = torch.where(scores < 0, scores * repetition_penalty,
                                       scores / repetition_penalty)
                scores = torch.where(seen[:, :scores.shape[1]], punished, scores)
            token = sample(scores, temperature, top_k, top_p) if do_sample else scores.argmax(-1)
            yield token, state
            input_ids = token[:, None]

    def generate(self, input_ids: Tensor, max_new_tokens: int = 100, num_beams: int = 1,
                 eos_token_id: Optional[int] = None, state: Optional[Tensor] = None,
                 **sampling) -> Tensor:
        """ids (B, T) -> (B, T + new), argument names and meanings as in Hugging Face's generate().

        sampling: do_sample, temperature, top_k, top_p, repetition_penalty, as in stream(). Rows
        that have ended are filled up with eos_token_id. state: what was read before input_ids.
        Raises ValueError for num_beams > 1 together with do_sample or repetition_penalty.
        """
        if num_beams > 1:
            if sampling.get("do_sample") or sampling.get("repetition_penalty", 1) != 1:
                raise ValueError("beam search takes neither do_sample nor repetition_penalty")
            rows = [self.beam_search(ids[None], max_new_tokens, num_beams, eos_token_id,
                                     None if state is None else state[i:i + 1])
                    for i, ids in enumerate(input_ids)]
            new = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos_token_id or 0)
            return torch.cat((input_ids, new), 1)
        new, ended = [], torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        for token, _ in self.stream(input_ids, max_new_tokens, state=state, **sampling):
            if eos_token_id is not None:
                token = torch.where(ended, eos_token_id, token)
                ended |= token == eos_token_id
            new.append(token)
            if ended.all():
                break
        return torch.cat((input_ids, torch.stack(new, 1)), 1)

    @torch.no_grad()
    def beam_search(self, input_ids: Tensor, max_new_tokens: int, num_beams: int,
                    eos_token_id: Optional[int], state: Optional[Tensor]) -> Tensor:
        """ids (1, T) -> the new ids of the beam with the best mean log-probability per token.

        A beam is a row of the state: following one copies that row, not a cache.
        """
        state, last = self.read(input_ids, state), input_ids[:, -1]
        beams, totals, done = input_ids[:, :0], torch.zeros(1, device=input_ids.device), []
        for length in range(1, max_new_tokens + 1):
            scores = self.scores(last, state).log_softmax(-1) + totals[:, None]
            best, flat = scores.flatten().topk(min(2 * num_beams, scores.numel()))  # some may end
            parent, token = flat // scores.shape[1], flat % scores.shape[1]
            grown = torch.cat((beams[parent], token[:, None]), 1)
            ended = token == (-1 if eos_token_id is None else eos_token_id)
            done += [(best[k].item() / length, grown[k])
                     for k in ended[:num_beams].nonzero()[:, 0].tolist()]
            keep = (~ended).nonzero()[:num_beams, 0]
            beams, totals, last = grown[keep], best[keep], token[keep]
            if len(done) >= num_beams and max(d[0] for d in done) >= totals[0].item() / length:
                break
            state = self.read(last[:, None], state[parent[keep]])
        done += [(total.item() / length, beam) for total, beam in zip(totals, beams)]
        return max(done, key=lambda pair: pair[0])[1]

def sample(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token id per row (B,) of logits (B, V). top_k 0 and top_p 1 switch those filters off."""
    scores = scores / max(temperature, 1e-5)
    if top_k:
        scores[scores < scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]] = -math.inf
    if top_p < 1:  # the fewest tokens whose probabilities add up to top_p (Holtzman et al. 2020)
        ordered, index = scores.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered[before >= top_p] = -math.inf
        scores = scores.scatter(1, index, ordered)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]

def make_model(config: Config, train: list[Dialogue]) -> NewLLM:
    """A fresh model with the embeddings that --embeddings asks for, or UserError."""
    text = torch.cat([torch.tensor([IM_START, IM_END]), *(d.ids for d in train)]).long()
    table, E, known = None, config.embed_dim, len(text.unique())
    path = Path(config.cache) / "gpt2-wte.safetensors"
    try:
        if config.embeddings in ("auto", "gpt2"):
            table = read_embeddings(path if path.exists() else download_gpt2_embeddings(path))
        elif config.embeddings != "learned":
            table = read_embeddings(Path(config.embeddings))
    except UserError as e:
        if config.embeddings != "auto":
            raise
        say(f"embeddings: {e}; learned instead (E = {E}), which costs {known * E:,} trained "
            f"parameters a table and all that GPT-2 knows; words that the training text lacks stay "
            f"unknown")
    torch.manual_seed(config.seed)
    settings = {name: getattr(config, name) for name in (
        "context_dim", "hidden_dim", "num_layers", "token_input_all_layers", "dropout", "cell",
        "solver", "tol", "max_sweeps", "word_memory")}
    model = NewLLM(**settings, embed_dim=E if table is None else table.shape[1], known=known,
                   embeddings="frozen" if table is not None else
                   "shared" if config.joint else "separate")
    model.know(text, torch.cat([d.ids[d.mask] for d in train]))
    if table is not None:
        nn.init.normal_(model.embed.weight, std=table.std().item())  # ChatML's rows stay like that
        model.embed.weight.data[model.row_of[:len(table)]] = table
        model.norm.weight.data.fill_(0.02)  # GPT-2's vectors are long: begin with small logits
    return model

def read_embeddings(path: Path) -> Tensor:
    """GPT-2's token embeddings (50257, 768), wte.weight of a .safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            names = {name.removeprefix("transformer."): name for name in file.keys()}
            table = file.get_tensor(names["wte.weight"]).float()
    except KeyError:
        raise UserError(f"{path} has no tensor wte.weight, only {sorted(names)[:4]}") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"--embeddings {path}: {cause(e)}; give auto, gpt2, learned or a "
                        f".safetensors file") from None
    if table.shape != (50257, 768):
        raise UserError(f"{path}: wte.weight has the shape {tuple(table.shape)}, GPT-2's is "
                        f"(50257, 768)")
    return table

def download_gpt2_embeddings(path: Path) -> Path:
    """Save wte.weight of openai-community/gpt2: 154 of the file's 548 MB are read."""
    from huggingface_hub import HfApi, HfFileSystem
    repo, part = "openai-community/gpt2", 2 ** 22
    try:
        HfApi().model_info(repo, timeout=5)  # one quick question before anything that retries
        with HfFileSystem().open(f"{repo}/model.safetensors", "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(size))["wte.weight"]["data_offsets"]
            file.seek(8 + size + begin)
            data = b"".join(file.read(min(part, end - begin - done)) for done in tqdm(
                range(0, end - begin, part), "GPT-2's embeddings", unit="x4MiB", disable=quiet()))
        table = torch.frombuffer(bytearray(data), dtype=torch.float32).view(50257, 768)
    except Exception as e:  # whatever the network does
        raise UserError(f"GPT-2's embeddings cannot be downloaded ({cause(e)})") from None
    save_tensors(path, {"wte.weight": table}, {})
    return path

# ------------------------------------------------------------------------------------------------
# 6. The run: checkpoints, devices, one optimizer step

def val_loss_of(path: Path) -> float:
    return float(path.stem.rsplit("-", 1)[1])

def best_checkpoint(folder: Path) -> Optional[Path]:
    """What to chat with: the best by validation loss, or the last if training has no patience."""
    best = sorted(folder.glob("epoch-*.safetensors"), key=val_loss_of)
    last = folder / "last.safetensors"
    if last.exists() and (not best or load_tensors(last, "none")[1]["config"]["patience"] == 0):
        return last
    return best[0] if best else None

def model_of(tensors: dict[str, Tensor], notes: dict, path: Path) -> NewLLM:
    """The model of a checkpoint. Raises UserError if another version of this file wrote it."""
    try:
        model = NewLLM(**notes["model"])
        model.load_state_dict(part_of(tensors, "model"))
        return model
    except (KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{path} is of another version of New-LLM ({cause(e)}); train "
                        f"anew") from None

def load_model(path: Path, device: str = "cpu") -> tuple[NewLLM, dict]:
    """The model of a checkpoint, ready to chat, and the checkpoint's notes."""
    tensors, notes = load_tensors(path, "model/")
    return model_of(tensors, notes, path).to(device).eval(), notes

def pick_device(name: str) -> torch.device:
    """cuda > mps > cpu, or what the user says. Raises UserError for a device that is not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    found = [kind for kind in there if there[kind]]
    if name != "auto" and not re.fullmatch(rf"({'|'.join(found)})(:\d+)?", name):
        raise UserError(f"--device {name} is not there; this machine has {', '.join(found)}")
    kind = found[0] if name == "auto" else name
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else (
        torch.device(kind))

def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """dtype of the matrix products outside the recurrence, and the reason for it in words."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16, "an older GPU, no bfloat16"
    if device.type == "cuda" or device.type == "cpu" and any(
            getattr(torch.cpu, f"_is_{unit}_supported", bool)()
            for unit in ("amx_tile", "avx512_bf16")):
        return torch.bfloat16, "the hardware multiplies it"
    return torch.float32, f"no bfloat16 in this {device.type}'s hardware that torch knows of"

class Stopped(Exception):
    """The user asked for it; everything is saved."""

class Run:
    """One training run: what both phases share."""

    def __init__(self, config: Config):
        self.config, self.device = config, pick_device(config.device)
        self.dtype, reason = pick_dtype(config.dtype, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.writer, self.interrupted, self.saved = None, False, time.perf_counter()
        self.parts = 1  # in which an optimizer step is computed, as memory demands
        say(f"device: {self.device}; states in float32, token block and output head in "
            f"{str(self.dtype)[6:]} ({reason})")
        if config.tensorboard and rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs a package: pip install tensorboard") from None
            self.writer = SummaryWriter(config.tensorboard)
        with contextlib.suppress(ValueError):  # raised outside the main thread
            signal.signal(signal.SIGINT, self.on_interrupt)

    def on_interrupt(self, *_):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        say("\nsaving at the next safe point (Ctrl-C again: leave at once)")

    def safe_point(self, save, where: str, stop: bool = False, over: bool = False):
        """Save once a minute, when it is over, and on Ctrl-C or `stop`, which then ends the run.

        Ctrl-C on one of several processes stops them all at the same step.
        """
        stop = stop or bool(global_sum(torch.tensor(float(self.interrupted), device=self.device)))
        if stop or over or time.perf_counter() - self.saved > 60:
            save()
            self.saved = time.perf_counter()
        if stop:
            raise Stopped(f"stopped after {where}, everything is saved; go on with: "
                          f"python newllm.py --out {self.config.out} --resume")

    def log(self, phase: str, step: int, **values):
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(f"{phase}/{name}", value, step)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def optimizer(self, parameters: dict[str, nn.Parameter], rate: float, tokens: int,
                  embedding_rate: float = 1.0):
        """AdamW on parameters by name, for steps of so many tokens; embeddings get their share of
        the learning rate."""
        self.parts = -(-tokens // 8192) if self.device.type == "cpu" else 1  # see step()
        groups = [dict(params=[p for name, p in parameters.items() if ("embed" in name) == embeds],
                       share=share) for embeds, share in ((False, 1.0), (True, embedding_rate))]
        return torch.optim.AdamW([g for g in groups if g["params"]], rate, fused=True,
                                 weight_decay=self.config.weight_decay)

    def step(self, optimizer, rate: float, progress: float, number: int, loss, share,
             count: int = 1, whole: bool = False):
        """One optimizer step on the gradient of (sum of losses) / count.

        rate, progress, number: peak learning rate, share of the schedule done, 0 to 1, step number.
        share: what of the batch is this process's; loss(some of it) returns a sum of losses first
        and then other sums. What does not fit into memory is computed in more parts, unless
        `whole`; tokens per step stay what they were. Returns all sums, over parts and processes.
        """
        warm = min(1.0, (number + 1) / max(1, self.config.warmup))
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = self.parts
        while True:
            try:
                # for dropout; a seed per step, so there is no random state to save
                torch.manual_seed((self.config.seed << 24) + number * world_size() + rank())
                optimizer.zero_grad(set_to_none=True)
                sums = self.scaler.scale(torch.zeros(4, device=self.device))  # sets the scaler up
                for part in filter(len, (share[k::self.parts] for k in range(self.parts))):
                    values = loss(part)
                    self.scaler.scale(values[0] / count).backward()
                    sums[:len(values)] += torch.stack([v.detach().float() for v in values])
                break
            except torch.OutOfMemoryError:
                if self.parts > 4096 or whole:
                    raise UserError("not even a small part of a batch fits into the device's "
                                    "memory; lower --phase1-batch-tokens, --hidden-dim or "
                                    "--max-len, or use --device cpu") from None
                self.parts += -(-self.parts // 4)  # small steps, to leave little memory unused
                values = None  # the graph that it holds needs memory too
        if number == 0 or self.parts > before:
            memory = "up to 8,192 tokens at once on a CPU"
            if self.device.type == "cuda":
                peak, (free, _) = (torch.cuda.max_memory_allocated(self.device),
                                   torch.cuda.mem_get_info(self.device))
                memory = f"{peak / 2**30:.2f} GiB at the peak, {free / 2**30:.2f} GiB still free"
            say(f"batch size: a step is computed in {self.parts} part(s): {memory}")
        if world_size() > 1:  # each has the gradient of its share, and the sum is the whole one
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        sums = global_sum(sums).cpu()
        if not math.isfinite(sums[0]):
            raise UserError(f"the loss is {sums[0]} at step {number}; train anew with a lower "
                            f"learning rate; the last good checkpoint: "
                            f"{best_checkpoint(Path(self.config.out)) or 'none'}")
        return sums

    def save(self, name: str, model: NewLLM, optimizer, more: dict, **notes):
        """A checkpoint: all chatting needs (weights, config, tokenizer) and all resuming needs."""
        if rank() == 0:
            save_tensors(Path(self.config.out) / name, more | dict(
                model=model.state_dict(), optimizer=optimizer.state_dict()["state"]),
                notes | dict(config=asdict(self.config), model=model.settings, parts=self.parts,
                             scaler=self.scaler.state_dict(),
                             tokenizer="tiktoken r50k_base + ChatML"))

    def restore(self, tensors: dict, notes: dict, optimizer):
        """Undo save(), but for the weights: go on as if nothing had happened."""
        state = {}
        for name, value in part_of(tensors, "optimizer").items():
            number, what = name.split("/")
            state.setdefault(int(number), {})[what] = value
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
        if notes["scaler"]:
            self.scaler.load_state_dict(notes["scaler"])
        self.parts = notes["parts"]

# ------------------------------------------------------------------------------------------------
# 7. Phase 1: learn the contexts of all tokens at once, without a softmax over the vocabulary

def by_length(dialogues: list[Dialogue], wanted) -> list[int]:
    """The wanted indices, those of short dialogues first."""
    return sorted(wanted, key=lambda i: len(dialogues[i].ids))

def share_of(dialogues: list[Dialogue]) -> list[int]:
    """Indices of this process's dialogues, dealt out by length."""
    return by_length(dialogues, range(len(dialogues)))[rank()::world_size()]

def batches_of(dialogues: list[Dialogue], wanted, tokens: int) -> list[list[int]]:
    """The wanted indices, of dialogues of like length, at most `tokens` together (or one)."""
    batches = []
    for i in by_length(dialogues, wanted):
        if not batches or (len(batches[-1]) + 1) * len(dialogues[i].ids) > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches

def pad(tensors: list[Tensor], device) -> Tensor:
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)

def collate(dialogues: list[Dialogue], indices: list[int], device) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T) int64, targets (B, T) bool and real (B, T) bool, which is False on padding."""
    some = [dialogues[i] for i in indices]
    return (pad([d.ids for d in some], device).long(), pad([d.mask for d in some], device),
            pad([torch.ones_like(d.mask) for d in some], device))

@torch.no_grad()
def all_states(run: Run, model: NewLLM, dialogues: list[Dialogue], wanted) -> dict[int, Tensor]:
    """The states (T, C) of the wanted dialogues by index, on the CPU."""
    states = {}
    batches = batches_of(dialogues, wanted, 8192)
    for batch in tqdm(batches, "contexts", disable=quiet(), leave=False):
        for i, s in zip(batch, model.states(collate(dialogues, batch, run.device)[0]).cpu()):
            states[i] = s[:len(dialogues[i].ids)].clone()
    return states

def cached_states(run: Run, model: NewLLM, train: list[Dialogue]) -> dict[int, Tensor]:
    """all_states() of this process's share, or none where --cache-gb cannot hold those of all."""
    fits = sum(len(d.ids) for d in train) * model.cell.C * 4 / 1e9 <= run.config.cache_gb
    return all_states(run, model, train, share_of(train)) if fits else {}

def effective_rank(contexts: Tensor) -> float:
    """exp(entropy of normalised singular values) / C of contexts (N, C) (Roy & Vetterli 2007)."""
    c = contexts[::max(1, len(contexts) // 4096)]
    p = torch.linalg.svdvals(c - c.mean(0))
    p = (p / p.sum()).clamp(min=1e-12)
    return torch.exp(-(p * p.log()).sum()).item() / contexts.shape[1]

def norm(c: Tensor) -> Tensor:
    """The original's diversity of contexts (N, C): minus their distance from their mean, over N."""
    n = global_sum(c.new_tensor(len(c)))
    return -global_sum((c - global_sum(c.sum(0)) / n).pow(2).sum()).sqrt() / n

def logdet(c: Tensor, eps: float = 0.05) -> Tensor:
    """-log det(I + Z Z^T / (n eps)) / C, with Z (C, n) the mean-free contexts of unit RMS."""
    z = c - global_sum(c.sum(0)) / global_sum(c.new_tensor(len(c)))
    scatter, C = global_sum(z.T @ z), c.shape[1]
    return -torch.logdet(torch.eye(C, device=c.device) + scatter / (scatter.trace() / C * eps)) / C

class ContextLoss(nn.Module):
    """Phase 1's loss, (1 - w) CVFP + w diversity.

    CVFP, context vector fixed point, is the mean squared change of a context since the last
    iteration. `query` asks for the next token, from this one and its context, as the token block
    will; it is thrown away after Phase 1.
    """

    def __init__(self, model: NewLLM, config: Config):
        super().__init__()
        self.model, self.config = model, config
        self.found = {}  # new states by dialogue, which phase1() collects
        self.everything = config.contrast_on == "everything"
        E, C, H = model.embed.embedding_dim, config.context_dim, config.hidden_dim
        self.query = nn.Sequential(nn.Linear(E + C, H), nn.SiLU(), nn.Linear(H, E))

    def told(self, d: Dialogue) -> Tensor:
        """The tokens (M,) of a dialogue that the contrast is to tell from others."""
        return d.ids[1:][(d.mask | self.everything)[1:]]

    def contrast(self, ids: Tensor, mask: Tensor, real: Tensor, c: Tensor, negatives: Tensor
                 ) -> Tensor:
        """InfoNCE (van den Oord et al. 2018), summed: which token comes next, among wrong ones?

        ids, mask, real (B, T) as from collate(), c (B, T, C), negatives (M,) token ids. A
        contrastive loss is alignment + uniformity (Wang & Isola 2020): uniformity is diversity,
        but spent on what tells tokens.
        """
        table, rows = self.model.context_table(), self.model.row_of[ids]
        after = (real & (mask | self.everything) & (rows < self.model.known))[:, 1:]
        x, y = self.model.embedded(table, ids), rows[:, 1:][after]
        q = F.normalize(self.query(torch.cat((x, c), dim=-1)[:, :-1][after]), dim=-1)
        negatives = self.model.row_of[negatives]
        right = (q * F.normalize(table(y), dim=-1)).sum(-1, keepdim=True)
        wrong = q @ F.normalize(table(negatives), dim=-1).T
        wrong = wrong.masked_fill(y[:, None] == negatives, -math.inf)
        scores = torch.cat((right, wrong), 1) / self.config.contrast_temperature
        return F.cross_entropy(scores, torch.zeros_like(y), reduction="sum")

    def forward(self, numbers: list[int], ids: Tensor, mask: Tensor, real: Tensor,
                previous: Optional[Tensor], negatives: Tensor, tokens: int, told: int,
                hidden: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For some dialogues of a batch of so many `tokens`, of which so many are to be `told`:
        their share of the loss, sums of changes and of the diversity, and how many tokens
        converged. previous (B, T, C): the last iteration's states. hidden: share of tokens that the
        context block is not shown, so that it cannot know the text by heart (word dropout:
        Bowman et al. 2016).
        """
        shown = torch.rand(ids.shape, device=ids.device) >= hidden if hidden else None
        states, w = self.model.states(ids, None, previous, shown), self.config.diversity_weight
        self.found |= {i: s[r].detach() for i, s, r in zip(numbers, states, real)}
        c, change, converged = self.model.contexts(states), states.new_zeros(1), real.new_zeros(1)
        if previous is not None:
            change = (c - self.model.contexts(previous))[real].pow(2).mean(-1)
            converged = change < self.config.threshold
        if self.config.diversity == "contrast":
            diversity = reported = self.contrast(ids, mask, real, c, negatives)
        else:  # one figure for all processes, and for all parts of the batch by their size
            diversity = dict(norm=norm, logdet=logdet)[self.config.diversity](c[real])
            diversity = diversity * global_sum(real.sum())
            reported = diversity / world_size()
        loss = (1 - w) * change.sum() / tokens + w * diversity / told
        return loss, change.sum(), reported, converged.sum()

    @torch.no_grad()
    def held_out(self, run: Run, val: list[Dialogue]) -> float:
        """The contrast per known token of dialogues not trained on, against fixed negatives."""
        follows = torch.cat([self.told(d) for d in val]).sort().values.long().to(run.device)
        follows = follows[self.model.row_of[follows] < self.model.known]
        if not len(follows):
            return 0.0
        negatives = follows[torch.linspace(0, len(follows) - 1, self.config.negatives).long()]
        total = torch.zeros((), device=run.device)
        for batch in batches_of(val, share_of(val), 8192):
            ids, mask, real = collate(val, batch, run.device)
            c = self.model.contexts(self.model.states(ids))
            total += self.contrast(ids, mask, real, c, negatives)
        return global_sum(total).item() / len(follows)

def phase1(run: Run, model: NewLLM, train: list[Dialogue], val: list[Dialogue],
           resumed=None) -> dict[int, Tensor]:
    """Learn the context block. Returns the states of this process's training dialogues by number,
    or none of them where --cache-gb cannot hold all.

    Weights and states are cached: a second run on the same data with the same settings finds them.
    """
    config, device, total = run.config, run.device, sum(len(d.ids) for d in train)
    content = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in (
        *model.parameters(), model.row_of, *(t for d in train + val for t in d),
        *all_states(run, model, train, [0]).values())))  # the last in case you edit the cell
    settings = {k: v for k, v in asdict(config).items() if k not in PHASE_2_ONLY}
    path = Path(config.cache) / "contexts-{}.safetensors".format(
        digest([settings, content.hexdigest(), device.type, rank(), world_size()]))
    there = global_sum(torch.tensor(float(path.exists()), device=device)) == world_size()
    if there and resumed is None:
        tensors, _ = load_tensors(path)
        model.load_state_dict(part_of(tensors, "model"), strict=False)
        say(f"phase 1: done before with the same data and settings, found in {path}")
        states = {int(i): s for i, s in part_of(tensors, "states").items()}
        return {} if config.joint else states or cached_states(run, model, train)
    contrasts, loss = config.diversity == "contrast", ContextLoss(model, config).to(device)
    same_everywhere(loss.query)
    block = {name: p for name, p in model.named_parameters() if p.requires_grad and (
        name.startswith("cell.") or p is model.context_table().weight)}
    optimizer = run.optimizer(block | dict(loss.query.named_parameters()),
                              config.phase1_learning_rate, config.phase1_batch_tokens)
    own, batches = set(share_of(train)), batches_of(train, range(len(train)),
                                                    config.phase1_batch_tokens)
    if not contrasts and min(map(len, batches)) < world_size() * run.parts > 1:
        raise UserError(f"--diversity {config.diversity} needs dialogues for each process and part "
                        f"in every step; raise --phase1-batch-tokens")
    start, first, factor, best, waited, share = time.perf_counter(), 1, 1.0, math.inf, 0, 0.0
    # factor: of the learning rate; waited: iterations without gain
    if resumed is None:
        model.solver, solver = "sequential", model.solver
        states, best_block = cached_states(run, model, train), None
        model.solver = solver
        if not states:
            say(f"phase 1: --cache-gb {config.cache_gb} cannot hold the states of {total:,} tokens;"
                f" their change is not measured, and Phase 2 recomputes them")
        say(f"phase 1: walked {total:,} tokens one by one in {time.perf_counter() - start:.1f} s; "
            f"now at most {config.iterations} iterations on whole batches")
    else:
        tensors, notes = resumed
        run.restore(tensors, notes, optimizer)
        loss.query.load_state_dict(part_of(tensors, "query"))
        best_block = {n: t.to(device) for n, t in part_of(tensors, "best").items()}
        states = {int(i): s for i, s in part_of(tensors, "states").items()}
        if world_size() > 1 or len(states) < len(train):  # only the first process's were saved
            states = cached_states(run, model, train)
        first, factor, best, waited, share = notes["iteration"] + 1, *notes["progress"]
    if config.negatives_power:  # as word2vec (Mikolov et al. 2013)
        counts = torch.bincount(torch.cat([loss.told(d) for d in train]))
        wanted = (counts / counts.max()) ** config.negatives_power
    for iteration in range(first, config.iterations + 1):
        start, sums, order = time.perf_counter(), torch.zeros(4), list(range(len(batches)))
        all_told = 0
        random.Random(f"{config.seed} {iteration}").shuffle(order)
        generator = torch.Generator().manual_seed(config.seed * 10007 + iteration)
        for number, k in enumerate(tqdm(order, f"iteration {iteration}", disable=quiet(),
                                        leave=False)):
            mine, loss.found = [i for i in batches[k] if i in own], {}
            after = torch.cat([loss.told(train[i]) for i in batches[k]]).long()
            if config.negatives_power:
                negatives = torch.multinomial(wanted, config.negatives, True, generator=generator)
            else:
                chosen = torch.randperm(len(after), generator=generator)[:config.negatives]
                negatives = after[chosen]
            tokens = sum(len(train[i].ids) for i in batches[k])
            told = len(after) if contrasts else tokens
            all_told += told

            def part(some):
                return loss(some, *collate(train, some, device),
                            pad([states[i] for i in some], device) if states else None,
                            negatives.to(device), tokens, told, config.word_dropout *
                            optimizer.param_groups[0]["lr"] / config.phase1_learning_rate)
            done = (iteration - 1) * len(batches) + number
            sums += run.step(optimizer, factor * config.phase1_learning_rate,
                             done / (config.iterations * len(batches)), done, part, mine,
                             whole=not contrasts and world_size() > 1)
            states |= {i: s.cpu() for i, s in loss.found.items() if states}
        cvfp, diversity, share = (sums[1:] / torch.tensor([total, all_told, total])).tolist()
        held_out, sweeps = loss.held_out(run, val) if contrasts else diversity, model.sweeps
        goal = held_out if config.phase1_watch == "held-out" else diversity
        some = states or all_states(run, model, train, range(min(64, len(train))))
        erank = effective_rank(model.contexts(torch.cat([*some.values()][:256])))
        say(f"  iteration {iteration:3d} | converged {share:6.1%} | CVFP {cvfp:.1e} | "
            f"{config.diversity} {diversity:+.3f}"
            f"{f', held out {held_out:+.3f}' if contrasts else ''} | effective rank {erank:.0%} | "
            f"{f'{sweeps} sweeps' if sweeps else 'loop'} | {time.perf_counter() - start:.1f} s")
        run.log("phase1", iteration, converged=share, cvfp=cvfp, held_out=held_out,
                diversity=diversity, effective_rank=erank, sweeps=sweeps)
        settled = not states or share >= 0.95 and waited != 1  # after a jump nothing is proven
        if not contrasts or goal < best - 1e-3:
            best, waited = goal, 0
            best_block = {n: p.detach().clone() for n, p in block.items()}
        else:  # learning for its own sake has begun: shorter steps, once from the best weights
            waited, factor = waited + 1, factor / 4
            if waited == 1:
                model.load_state_dict(best_block, strict=False)
        if iteration >= config.min_iterations and settled and (waited or not contrasts):
            break
        run.safe_point(lambda: run.save(
            "last.safetensors", model, optimizer,
            dict(query=loss.query.state_dict(), best=best_block,
                 states=states if run.interrupted else {}),  # after a crash they are made anew
            phase=1, iteration=iteration, progress=[factor, best, waited, share]),
            f"iteration {iteration} of phase 1")
    report(run, model, train, share if config.iterations and states else 1.0)
    states = {} if config.joint else cached_states(run, model, train)
    if resumed is None:
        save_tensors(path, dict(model=block, states=states), {})
    return states

@torch.no_grad()
def report(run: Run, model: NewLLM, train: list[Dialogue], share: float):
    """Say whether the cache is what a chat will see, and warn of ways in which contexts fail."""
    longest = by_length(train, range(len(train)))[-4:]
    walked, sweeps, states = [], [], all_states(run, model, train, longest)
    cached = torch.cat([states[i] for i in longest])
    for i in longest:  # one dialogue at a time, as a chat reads it
        u = model.token_share(collate(train, [i], run.device)[0])
        s0 = u.new_zeros(1, model.cell.C)
        walked.append(walk(model.cell, u, s0)[0][0].cpu())
        if model.cell.kind == "gated":
            sweeps.append(solve(model.cell, u, s0, None, model.tol, model.max_sweeps)[2])
    noise = u.new_empty(256, model.cell.C).normal_(std=cached.std().item())
    same = F.cosine_similarity(model.cell(u[0, :1].expand(256, -1), noise)[0], noise).mean().item()
    cached, walked = model.contexts(cached), model.contexts(torch.cat(walked))
    alike = F.normalize(cached, dim=-1).mean(0).pow(2).sum().item()
    say(f"phase 1: cached contexts differ from the token loop's by "
        f"{(cached - walked).pow(2).mean():.1e} (mean square; 2 = unrelated); the parallel solver "
        f"takes {max(sweeps) if sweeps and all(sweeps) else 'too many'} sweeps; mean cosine of two "
        f"contexts {alike:.2f}, of the state before and after a step {same:.2f}")
    if same > 0.95:
        say("warning: identity mapping, the state hardly changes; raise --phase1-learning-rate")
    if alike > 0.95:
        say("warning: global attractor, all contexts are alike; raise --diversity-weight")
    if share < 0.95:
        say(f"warning: only {share:.0%} of the tokens converged; raise --iterations, or else "
            f"--context-dim, --hidden-dim or --num-layers")

# ------------------------------------------------------------------------------------------------
# 8. Phase 2: learn to predict the assistant's words

def rows_of(ids: Tensor, mask: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ids and mask (..., T) and states (..., T, C) the N targets, each with what comes before
    it: tokens (N,), next tokens (N,), states (N, C)."""
    at = mask[..., 1:]
    return ids[..., :-1][at].long(), ids[..., 1:][at].long(), states[..., :-1, :][at]

def word_loss(model: NewLLM, ids: Tensor, y: Tensor, states: Tensor,
              recalled: Optional[Tensor] = None) -> tuple[Tensor, ...]:
    """Phase 2's loss on rows_of() a text: its sum, how many were right, how many there are."""
    loss, correct = model.cross_entropy(model.hidden_states(ids, states), y, recalled)
    return loss, correct, correct.new_tensor(len(y))

@torch.no_grad()
def evaluate(run: Run, model: NewLLM, dialogues: list[Dialogue]) -> tuple[float, float]:
    """Loss and accuracy per target token of all dialogues; each process takes its share."""
    model.eval()
    sums = torch.zeros(3, device=run.device)
    for batch in batches_of(dialogues, share_of(dialogues), 1024 if model.memory else 8192):
        ids, mask, _ = collate(dialogues, batch, run.device)
        rows = rows_of(ids, mask, model.states(ids))
        if model.memory:
            memories = torch.stack([*model.memory(model.row_of[ids])], 1)
            rows += (model.memory.recall(rows_of(ids, mask, memories)[2]),)
        with run.autocast():
            found = word_loss(model, *rows)
        sums += torch.stack([v.float() for v in found])
    model.train()
    loss, correct, count = global_sum(sums).tolist()
    return loss / count, correct / count

def phase2(run: Run, model: NewLLM, train: list[Dialogue], val: list[Dialogue],
           states: dict[int, Tensor], resumed=None) -> dict:
    """Train the token block on cached states; on whole dialogues where there are none, and with
    --joint, which trains the context block too. Returns figures of the epoch to chat with.
    """
    config, device, per = run.config, run.device, run.config.batch_tokens
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and (
        config.joint or not name.startswith(("cell.", "context_embed.")))}
    optimizer = run.optimizer(trained, config.learning_rate, per, config.embedding_rate)
    rows = [torch.cat(column) for column in zip(*(rows_of(*train[i], states[i])
                                                  for i in sorted(states)))]
    own = set(share_of(train))
    batches = batches_of(train, range(len(train)), per)
    steps = -(-targets(train) // per) if rows else len(batches)
    epoch, step, waited, best, figures, best_figures = 0, 0, 0, math.inf, {}, {}
    sums = torch.zeros(4)
    if resumed is not None:
        run.restore(*resumed, optimizer)
        epoch, step, waited, best, figures = resumed[1]["progress"]
        sums, best = resumed[0]["sums"], math.inf if best is None else best
    elif model.context_embed is not None:  # what Phase 1 learned is a good start for the head
        model.embed.weight.data.copy_(model.context_embed.weight)
    say(f"phase 2: {targets(train):,} target tokens, {steps} optimizer steps per epoch; " + (
        "context and token block learn together" if config.joint else "contexts frozen, " +
        ("taken from the cache" if rows else "recomputed for each batch")))
    start, tokens, first = time.perf_counter(), 0, epoch

    def loss(some):
        if rows:
            part = [column[some].to(device) for column in rows]
        else:
            ids, mask, _ = collate(train, some, device)
            with torch.set_grad_enabled(config.joint):
                part = rows_of(ids, mask, model.states(ids))
        with run.autocast():
            return word_loss(model, *part)

    def save(name="last.safetensors"):
        run.save(name, model, optimizer, dict(sums=sums), phase=2, val_loss=figures.get("val_loss"),
                 progress=[epoch, step, waited, best if best < math.inf else None, figures])

    def over():
        return epoch >= config.epochs or 0 < config.patience <= waited

    model.train()
    if over():  # resumed at its end: the config may be new, and says which epoch to chat with
        save()
    while not over():
        generator = torch.Generator().manual_seed(config.seed * 10007 + epoch)
        if rows:
            shares = torch.randperm(len(rows[0]), generator=generator).tensor_split(steps)
        else:
            shares = [[i for i in batches[k] if i in own]
                      for k in torch.randperm(steps, generator=generator).tolist()]
        for share in tqdm(shares[step:], f"epoch {epoch + 1}", disable=quiet(), leave=False):
            count = len(share) if rows else targets([train[i] for i in share])
            count = int(global_sum(torch.tensor(count, device=device)))
            done = epoch * steps + step
            sums += run.step(optimizer, config.learning_rate, done / (config.epochs * steps), done,
                             loss, share, count)
            step, tokens = step + 1, tokens + count
            if step < steps:
                run.safe_point(save, f"step {step} of {steps} in epoch {epoch + 1}")
        train_loss, accuracy, _ = (sums[:3] / sums[2]).tolist()
        val_loss, val_accuracy = evaluate(run, model, val)
        figures = dict(train_loss=train_loss, train_accuracy=accuracy, val_loss=val_loss,
                       val_accuracy=val_accuracy, val_ppl=math.exp(min(val_loss, 99)))
        better, best = val_loss < best, min(best, val_loss)
        epoch, step, sums, waited = epoch + 1, 0, torch.zeros(4), 0 if better else waited + 1
        seconds = time.perf_counter() - start
        say(f"  epoch {epoch:3d}/{config.epochs} | train loss {train_loss:.4f}, PPL "
            f"{math.exp(min(train_loss, 99)):,.1f}, accuracy {accuracy:.1%} | "
            f"val loss {val_loss:.4f}, PPL {figures['val_ppl']:,.1f}, accuracy {val_accuracy:.1%} "
            f"| {tokens / seconds:,.0f} tokens/s | "
            f"{seconds * (config.epochs - epoch) / (epoch - first):.0f} s left")
        run.log("phase2", epoch, **figures)
        if better or config.patience == 0:
            best_figures = figures
        if better:
            save(f"epoch-{epoch:03d}-{val_loss:.4f}.safetensors")
            by_loss = sorted(Path(config.out).glob("epoch-*.safetensors"), key=val_loss_of)
            for path in by_loss[3:] if rank() == 0 else []:
                path.unlink()
        run.safe_point(save, f"epoch {epoch} of phase 2",
                       0 < config.stop_after <= epoch - first and not over(), over())
    return best_figures or figures

# ------------------------------------------------------------------------------------------------
# 9. Everything together

def generate(model: NewLLM, text: str, max_new_tokens: int = 200, **how) -> str:
    """The model's answer to one message; `how` as in NewLLM.generate(), greedy if not given."""
    tokenizer = Tokenizer()
    question = torch.tensor([tokenizer.question(text)], device=model.embed.weight.device)
    ids = model.eval().generate(question, max_new_tokens, eos_token_id=IM_END, **how)
    return tokenizer.text([i for i in ids[0, question.shape[1]:].tolist() if i != IM_END]).strip()

def show_data(dialogues: list[Dialogue], tokenizer: Tokenizer):
    """Print dialogues as the model sees them, targets in green, or in [brackets] in a file."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() or in_notebook() else ("[", "]")
    for number, d in enumerate(dialogues, 1):
        print(f"--- dialogue {number}: {len(d.ids)} tokens, {targets([d])} of them targets")
        for target, pairs in itertools.groupby(zip(d.mask.tolist(), d.ids.tolist()),
                                               key=lambda p: p[0]):
            text = tokenizer.text([i for _, i in pairs])
            print(on + text + off if target else text, end="")

def train_model(config: Config, resumed=None) -> tuple[Optional[NewLLM], dict]:
    """Both phases. Returns the model to chat with and its figures."""
    torch.set_flush_denormal(True)  # numbers near 1e-40 make exp ten times slower
    out, tokenizer = Path(config.out), Tokenizer()
    save_tensors(out / ".writable", {}, {})  # better to learn it now than after hours
    (out / ".writable").unlink(missing_ok=True)
    if config.data == Config.data and not Path(config.data).exists():
        config = replace(config, data="ultrachat")
        say(f"data: no {Config.data} here, as when pasted into a notebook; UltraChat instead")
    train, val = prepare(config, tokenizer)
    if config.show_data:
        return show_data(train[:config.show_data], tokenizer), {}
    if len(train) < world_size():
        raise UserError(f"{len(train)} dialogues cannot be dealt out to {world_size()} processes; "
                        f"raise --samples, or start fewer")
    run = Run(config)
    if resumed is None:
        with first_on_its_machine():
            model = make_model(config, train)
        old = [*out.glob("epoch-*.safetensors"), *out.glob("last.safetensors")]
        if old and rank() == 0:
            shelf = out / time.strftime("before-%Y%m%d-%H%M%S")
            shelf.mkdir()
            for path in old:
                path.rename(shelf / path.name)
            say(f"checkpoints of an earlier run were moved to {shelf}")
    else:
        model = model_of(*resumed, out / "last.safetensors")
    model.to(run.device)
    same_everywhere(model)
    count = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"parameters: {trained:,} trained, {sum(count.values()) - trained:,} frozen; "
        f"{sum(n for name, n in count.items() if 'embed' not in name):,} outside the embeddings; "
        f"output head tied to the embeddings (untied: "
        f"{model.known * model.embed.embedding_dim:,} more)")
    in_phase2, states = resumed is not None and resumed[1]["phase"] == 2, {}
    if not in_phase2 and (config.iterations or not config.joint):
        states = phase1(run, model, train, val, resumed)
    elif not config.joint:
        states = cached_states(run, model, train)
    figures = phase2(run, model, train, val, states, resumed if in_phase2 else None)
    if rank() == 0:
        model = load_model(best_checkpoint(out), str(run.device))[0]
    some = all_states(run, model, train, range(min(64, len(train))))
    figures["effective_rank"] = effective_rank(model.contexts(torch.cat([*some.values()])))
    return model.eval(), figures | dict(tokens=sum(len(d.ids) for d in train))

def scaling(config: Config):
    """Train a model on each of several numbers of dialogues; fit PPL = A tokens^alpha."""
    points = []
    for size in config.scaling.split(","):
        say(f"\n=== {size} dialogues")
        _, f = train_model(replace(  # each model's figures are those of its best epoch
            config, samples=int(size), scaling="", out=str(Path(config.out) / size),
            patience=config.patience or config.epochs))
        points.append((int(size), f["tokens"], f["val_ppl"], f["val_accuracy"],
                       f["effective_rank"]))
    say("\ndialogues      tokens    val PPL  accuracy  effective rank")
    for point in points:
        say("{:9,d} {:11,d} {:10.1f} {:9.1%} {:15.0%}".format(*point))
    x, y = (torch.tensor([p[k] for p in points], dtype=torch.float64).log() for k in (1, 2))
    A = torch.stack((torch.ones_like(x), x), 1)
    fit = torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
    r2 = 1 - (y - A @ fit).pow(2).sum() / (y - y.mean()).pow(2).sum()
    say(f"PPL = {fit[0].exp():.4g} tokens^{fit[1]:.3f}, R^2 = {r2:.3f}")

def earlier_run(config: Config, asked: dict) -> tuple[Config, tuple[dict, dict]]:
    """For --resume: the last checkpoint and its config, with what may change changed."""
    path = Path(config.out) / "last.safetensors"
    if not path.exists():
        raise UserError(f"--resume: there is no {path}; train first, name its folder with --out, "
                        f"or copy it from the first machine")
    tensors, notes = load_tensors(path)
    try:
        old = Config(**notes["config"])
    except (KeyError, TypeError) as e:
        raise UserError(f"--resume: {path} is of another version of New-LLM ({cause(e)}); train "
                        f"anew in another --out") from None
    for name, value in asked.items():
        if name not in MAY_CHANGE and value != getattr(old, name):
            raise UserError(f"--resume: {path} was trained with {flag_of(name)} "
                            f"{getattr(old, name)}, not {value}; leave that out, or train anew in "
                            f"another --out")
    changes = {"stop_after": 0} | {k: v for k, v in asked.items() if k in MAY_CHANGE}
    return replace(old, **changes), (tensors, notes)

def main(argv: Optional[list[str]] = None) -> Optional[NewLLM]:
    """Train as the options say, which in a notebook are not the kernel's own. Returns the model."""
    command = argv if argv is not None else [] if in_notebook() else sys.argv[1:]
    start = time.perf_counter()
    try:
        config, asked = parse(command)
        config, resumed = earlier_run(config, asked) if config.resume else (config, None)
        if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
            device = pick_device(config.device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=3))
        changed = [f"{k} {v}" for k, v in asdict(config).items() if v != getattr(Config(), k)]
        say(f"settings other than the defaults: {', '.join(changed) or 'none'}")
        if config.scaling and not config.show_data:
            return scaling(config)
        model, _ = train_model(config, resumed)
        if model is not None and rank() == 0:
            where = "" if config.out == Config.out else f" --checkpoint {config.out}"
            print(f"done in {time.perf_counter() - start:.0f} s, checkpoints in {config.out}/\n\n"
                  f"You: who are you?\nNew-LLM: {generate(model, 'who are you?')}\n\n"
                  f"chat with it: python chat.py{where}")
        return model
    except Stopped as e:
        say(str(e))
    except UserError as e:
        print(f"newllm.py: {e}", file=sys.stderr)
        if not in_notebook():
            sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing more was saved")
    finally:
        with contextlib.suppress(ValueError):  # raised outside the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return None

if __name__ == "__main__":
    main()
