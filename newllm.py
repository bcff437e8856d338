"""New-LLM: a language model without attention, in one file you can read from top to bottom.

All that the model remembers of a text is one vector of fixed size, the state. A token changes it,
the next word is read from it, and it is handed on to the next token: a chat costs the same memory
and the same time per token after ten tokens and after a million. Training has two phases: Phase 1
learns the states of all tokens in parallel, Phase 2 keeps them fixed and learns to speak.

    python newllm.py --small        learn ten dialogues by heart
    python chat.py                  chat with what was trained
    python newllm.py --help         every option; each is one field of Config, just below

The letters that the code and its comments use:

    B, T      dialogues in a batch, tokens in a dialogue
    V         vocabulary: <unk>, two tokens of ChatML, and GPT-2's tokens that the text has
    E, C, H   embed_dim, context_dim, hidden_dim
    x         embedded, normalised tokens                  (B, T, E)
    u         what they add to the first hidden layer      (B, T, H)
    s         the state that goes from token to token      (B, C)
    c         the context, LayerNorm(s): what is read      (B, C)
"""
import argparse
import builtins
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import HfApi, HfFileSystem, PyTorchModelHubMixin
from torch import Tensor
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 1. Configuration: the command line is made from these fields, context_dim becomes --context-dim

class UserError(ValueError):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""

def option(group, default, help, choices=None, least=1, below=math.inf):
    """A field of Config: help gives the unit; numbers are from `least` on and below `below`."""
    return field(default=default, metadata=dict(group=group, help=help, choices=choices,
                                                least=least, below=below))

@dataclass
class Config:
    """Every setting of a run. A preset changes some defaults, the command line any of them."""
    data: str = option("data", "data/chats.jsonl", "ultrachat, a hub dataset, .jsonl or .txt file")
    val_data: str = option("data", "", "the same kinds, to validate on")
    samples: int = option("data", 10, "dialogues to read; 0: all, as with a file of yours", least=0)
    max_len: int = option("data", 512, "tokens after which a dialogue is cut", least=2)
    show_data: int = option("data", 0, "dialogues to print, targets marked, and stop", least=0)
    embeddings: str = option("model", "learned", "learned; gpt2: GPT-2's, frozen; auto: gpt2 where "
                             "it can be had; or a .safetensors file with wte.weight")
    embed_dim: int = option("model", 256, "E of learned embeddings; GPT-2's have 768")
    num_layers: int = option("model", 1, "hidden layers of each of the two blocks")
    context_dim: int = option("model", 128, "C, numbers in the state")
    hidden_dim: int = option("model", 256, "H, units of a hidden layer")
    token_input_all_layers: bool = option("model", False, "feed the token to all hidden layers")
    dropout: float = option("model", 0.0, "share of the token block's units that Phase 2 drops",
                            least=0, below=1)
    solver: str = option("model", "auto", "of the states", ("auto", "parallel", "sequential"))
    iterations: int = option("Phase 1", 40, "passes over the data; 0: contexts untrained", least=0)
    epochs: int = option("Phase 2", 40, "passes over the data")
    learning_rate: float = option("Phase 2", 4e-3, "AdamW's peak learning rate", least=1e-9)
    batch_tokens: int = option("Phase 2", 64, "tokens per optimizer step, in whole dialogues")
    joint: bool = option("Phase 2", False, "train the context block too, through the recurrence")
    patience: int = option("Phase 2", 0, "epochs without gain on held-out dialogues until it stops;"
                           " 0: learn all by heart, hold nothing out", least=0)
    device: str = option("machine", "auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("machine", "auto", "outside the recurrence",
                        ("auto", "float32", "bfloat16", "float16"))
    cache_gb: float = option("machine", 4.0, "GB for states, or they are computed again", least=0)
    seed: int = option("machine", 42, "of everything random", least=0, below=2 ** 31)
    out: str = option("machine", "checkpoints", "folder of the checkpoints")
    cache: str = option("machine", "cache", "folder of downloads and Phase 1's results")
    resume: bool = option("machine", False, "go on from the last checkpoint in --out")
    tensorboard: str = option("machine", "", "folder for TensorBoard's logs")

    def __post_init__(self):
        for f in fields(self):
            value, least, below = getattr(self, f.name), f.metadata["least"], f.metadata["below"]
            if f.type in (int, float) and not least <= value < below:
                raise UserError(f"{flag_of(f.name)} {value}: give at least {least:g}"
                                + (f", below {below:g}" if below < math.inf else ""))
        if not Path(self.data).name:
            raise UserError(f"--data {self.data!r}: give a file, or a dataset's name")
        self.by_heart = self.patience == 0  # learn these dialogues, or learn from them for others?

PRESETS = {  # what it is for, and what it changes
    "small": ("ten dialogues by heart, in seconds (this is the default)", {}),
    "medium": ("100 dialogues of UltraChat by heart", dict(
        data="ultrachat", samples=100, embeddings="auto", num_layers=2, context_dim=256,
        hidden_dim=512, iterations=20, learning_rate=3e-3, batch_tokens=512)),
    "large": ("1,000 dialogues of UltraChat, to answer new questions", dict(
        data="ultrachat", samples=1000, max_len=1024, embeddings="auto", num_layers=4,
        context_dim=512, hidden_dim=1024, dropout=0.3, iterations=16, epochs=4, patience=2,
        learning_rate=2e-3, batch_tokens=2048)),
}
PHASE_1_READS = ("embeddings", "embed_dim", "num_layers", "context_dim", "hidden_dim", "joint",
                 "token_input_all_layers", "solver", "iterations", "cache_gb", "seed")
MAY_CHANGE = ("out", "resume", "device", "cache", "tensorboard", "show_data")  # with --resume

def parse(argv: list[str]) -> tuple[Config, dict]:
    """The command line as a Config, and those of its values that were typed."""
    parser = argparse.ArgumentParser(
        "newllm.py", allow_abbrev=False, description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="examples:\n"
        "  python newllm.py --small                       ten dialogues by heart, in seconds\n"
        "  python newllm.py --medium --data mine.jsonl    all of your own by heart\n"
        "  python newllm.py --large --samples 5000        UltraChat, for new questions")

    def fail(message):
        raise UserError(f"{message} (python newllm.py --help lists the options)")
    parser.error = fail
    groups = {"start": parser.add_argument_group("start here").add_mutually_exclusive_group()}
    for name, (about, _) in PRESETS.items():
        groups["start"].add_argument(f"--{name}", dest="preset", action="store_const", const=name,
                                     help=about, default="small")
    for f in fields(Config):
        name, choices = f.metadata["group"], f.metadata["choices"]
        groups[name] = groups.get(name) or parser.add_argument_group(name)
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=choices, metavar=None if choices else f.type.__name__.upper()))
        groups[name].add_argument(flag_of(f.name), default=argparse.SUPPRESS, **kind, help=(
            f"{f.metadata['help']} (small: {'none' if f.default == '' else f.default})"))
    given = vars(parser.parse_args(argv))
    asked = PRESETS[given.pop("preset")][1] | given
    if "data" in given and is_file(given["data"]):
        asked["samples"] = given.get("samples", 0)
    return Config(**asked), given

# ------------------------------------------------------------------------------------------------
# 2. Data: dialogues in; token ids, and a mask of the assistant's words, out

UNK, IM_START, IM_END = 0, 1, 2  # a word that the training text lacks; ChatML's begin and end
if Path("data/0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").exists():  # the name tiktoken looks for
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path("data").resolve()))

class Dialogue(NamedTuple):
    ids: Tensor   # (T,) int64
    mask: Tensor  # (T,) bool, True on what is to be predicted: an answer and its <|im_end|>

class Tokenizer:
    """Text to token ids and back: GPT-2's byte pairs (r50k_base of github.com/openai/tiktoken).

    vocab (V,) says which byte pair an id stands for, from 3 on; None: all 50,256 in their order.
    """

    def __init__(self, vocab: Optional[Tensor] = None):
        import tiktoken
        try:
            self.pairs = tiktoken.get_encoding("r50k_base")
        except Exception as e:  # whatever the network or the cache folder does
            raise UserError(f"tiktoken cannot load r50k_base ({cause(e)}); go online once, or "
                            f"start in the folder that has newllm.py's data/") from None
        self.vocab = torch.arange(-3, 50256) if vocab is None else vocab.cpu()
        self.id_of = {pair: i for i, pair in enumerate(self.vocab.tolist()) if pair >= 0}

    def encode(self, text: str) -> list[int]:
        """Text is never mistaken for a special token: a typed <|im_end|> is seven ordinary ones."""
        return [self.id_of.get(pair, UNK) for pair in self.pairs.encode_ordinary(text)]

    def bytes_of(self, i: int) -> bytes:
        special = (b"<unk>", b"<|im_start|>", b"<|im_end|>")
        return special[i] if i < 3 else self.pairs.decode_single_token_bytes(int(self.vocab[i]))

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def dialogue(self, messages: list[tuple[str, str]]) -> Dialogue:
        """ChatML: <|im_start|>role, a new line, the text, <|im_end|>, a new line, per message."""
        ids, mask = [], []
        for role, text in messages:
            before, body = [IM_START, *self.encode(role + "\n")], [*self.encode(text), IM_END]
            ids += before + body + self.encode("\n")
            mask += [False] * len(before) + [role == "assistant"] * len(body) + [False]
        return Dialogue(torch.tensor(ids), torch.tensor(mask))

    def question(self, text: str) -> list[int]:
        """A user's message, and the head of the answer that the model is to write."""
        ids = self.dialogue([("user", text)]).ids.tolist()
        return [*ids, IM_START, *self.encode("assistant\n")]

def is_file(name: str) -> bool:
    """A local file, existing or meant; anything else is a name on the Hugging Face hub."""
    return Path(name).suffix in (".jsonl", ".json", ".txt") or Path(name).exists()

def read_messages(path: Path) -> Iterator[str | list[tuple[str, str]]]:
    """Dialogues of a .jsonl file or .json array in UltraChat's form, as (role, text) pairs; of a
    .txt file the whole text. Raises UserError, which names the line."""
    number = 1
    try:
        text = path.read_text("utf-8-sig")
        array = text.lstrip().startswith("[")
        items = [text] if path.suffix == ".txt" else json.loads(text) if array else text.split("\n")
        for number, item in enumerate(items, 1):
            if path.suffix == ".txt":
                yield item
            elif array or item.strip():
                record = item if array else json.loads(item)
                messages = [(m["role"], m["content"]) for m in record["messages"]]
                roles = {role for role, text in messages if text.strip()}
                if not {"assistant"} <= roles <= {"system", "user", "assistant"}:
                    raise UserError(f"{path} line {number}: roles {sorted(roles)}; an assistant is "
                                    f"needed, and none but system, user and assistant")
                yield messages
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}); name an existing file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); give a text file") from None
    except json.JSONDecodeError as e:
        line = e.lineno if array else number
        raise UserError(f"{path} line {line} is not JSON: {e.msg}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} line {number}: no messages, each a role and a content") from None

def download(name: str, split: str, samples: int, cache: str) -> Path:
    """The first dialogues of a dataset on the hub, streamed into a .jsonl file in the cache."""
    path = Path(cache) / f"{name.replace('/', '--')}-{split}-{samples or 'all'}.jsonl"
    if not path.exists():
        try:
            HfApi().dataset_info(name, timeout=5)  # datasets alone would try for half a minute
            import datasets
            records = datasets.load_dataset(name, split=split, streaming=True)
            lines = [json.dumps(dict(messages=record["messages"])) + "\n" for record in tqdm(
                itertools.islice(records, samples or None), f"downloading {name}", disable=None)]
        except Exception as e:  # whatever the network does
            raise UserError(f"cannot read dataset {name}, split {split} ({cause(e)}); offline, use "
                            f"the shipped dialogues: --data data/chats.jsonl") from None
        write(path, lambda file: file.write("".join(lines).encode()))
    return path

def read(name: str, config: Config, tokenizer: Tokenizer, training: bool) -> list[Dialogue]:
    """All dialogues of a file or a dataset; of a .txt file pieces, every token a target."""
    samples, path = (config.samples or None) if training else None, Path(name)
    if not is_file(name):
        hub = dict(ultrachat="HuggingFaceH4/ultrachat_200k").get(name, name)
        split = ("train" if training else "test") + "_sft" * (name == "ultrachat")
        path = download(hub, split, samples if training else 100, config.cache)
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UserError(f"{path}: unknown kind of file; give a .jsonl or a .txt file")
    items = itertools.islice(read_messages(path), samples)
    if path.suffix != ".txt":
        return [tokenizer.dialogue(messages) for messages in items]
    ids = torch.tensor(tokenizer.encode(next(items)), dtype=torch.long)
    size = config.max_len if config.by_heart else min(config.max_len, -(-len(ids) // 10))
    return [Dialogue(p, p >= 0) for p in ids.split(max(2, size))][:samples]

def load(config: Config) -> tuple[list[Dialogue], list[Dialogue], Tensor]:
    """Dialogues to train on, others to validate on (none by heart), and the vocabulary (V,).

    The vocabulary is the training text's. Raises UserError where a source is broken or too small.
    """
    tokenizer = Tokenizer()
    train, val = read(config.data, config, tokenizer, True), []
    if config.val_data or config.data == "ultrachat" and not config.by_heart:
        val = read(config.val_data or config.data, config, tokenizer, False)
    elif not config.by_heart:  # every tenth dialogue, the last tenth of a plain text
        n, text = len(train), config.data.endswith(".txt")
        held = range(n)[-max(1, n // 10):] if text else range(n)[min(9, n - 1)::10]
        val, train = [train[i] for i in held], [d for i, d in enumerate(train) if i not in held]
    seen = {tuple(d.ids.tolist()) for d in train}
    val = [d for d in val if tuple(d.ids.tolist()) not in seen]
    n, cut = len(train + val), sum(len(d.ids) > config.max_len for d in train + val)
    train, val = ([d for d in (Dialogue(ids[:config.max_len], mask[:config.max_len])
                               for ids, mask in part) if d.mask[1:].any()] for part in (train, val))
    used = torch.cat([torch.arange(3), *(d.ids for d in train)]).unique()
    number = torch.zeros(len(tokenizer.vocab), dtype=torch.long)  # what the text lacks is UNK, 0
    number[used] = torch.arange(len(used))
    train = [Dialogue(number[d.ids], d.mask) for d in train]
    known = [Dialogue(number[d.ids], d.mask & (number[d.ids] != UNK)) for d in val]
    known = [d for d in known if d.mask[1:].any()]
    if not train or not known and (config.val_data or not config.by_heart):
        raise UserError(f"{config.data}: {len(train)} dialogues to train on and {len(known)} others"
                        f" to validate on are too few; see --val-data and --max-len")
    say(f"data: {len(train)} dialogues, {tokens_in(train):,} tokens, {targets_in(train):,} of them "
        f"targets; V = {len(used):,}; {cut} cut at {config.max_len} tokens, "
        f"{n - len(train) - len(val)} without an answer left out")
    say(f"held out: {len(val)} dialogues; {1 - targets_in(known) / targets_in(val):.1%} of their "
        f"targets do not occur in the training text and are not counted" if val else
        "all learned by heart: nothing is held out, the figures are those of these dialogues")
    return train, known, tokenizer.vocab[used]

def tokens_in(dialogues: list[Dialogue]) -> int:
    return sum(len(d.ids) for d in dialogues)

def targets_in(dialogues: list[Dialogue]) -> int:
    return sum(int(d.mask[1:].sum()) for d in dialogues)

# ------------------------------------------------------------------------------------------------
# 3. The contexts: one cell, walked token by token or solved for all tokens at once

TOLERANCE, MAX_SWEEPS = 5e-5, 30  # of solve(): largest change in units of a state's size; give up

class Cell(nn.Module):
    """One step of the recurrence: (u_t, s_{t-1}) -> s_t."""

    def __init__(self, config: Config):
        super().__init__()
        E, C, H, layers = config.embed_dim, config.context_dim, config.hidden_dim, config.num_layers
        self.token_in = nn.Linear(E, H * (layers if config.token_input_all_layers else 1))
        self.state_in = nn.Linear(C, H, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(H, H) for _ in range(layers - 1))
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
        a = F.silu(first + self.state_in(s))                    # what the token and the state say
        for k, layer in enumerate(self.hidden):
            a = F.silu(layer(a) + (others[k] if others else 0))
        f, i, d = self.gates(a).chunk(3, dim=-1)
        f, i, d = torch.sigmoid(f), torch.sigmoid(i), torch.tanh(d)  # forget, input, candidate
        # An average of the old state and the new: |s| stays below 1, and what is old fades, so
        # that errors die out. LayerNorm in here would blow them up again; it comes at the reading.
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

def context(s: Tensor) -> Tensor:
    """c = LayerNorm(s): what is read of states (..., C); zero mean and unit variance."""
    return F.layer_norm(s, s.shape[-1:])

def chunked(x: Tensor, L: int) -> Tensor:
    """(B, T, D) -> (B * n, L, D): n chunks of L tokens, the last filled up with zeros."""
    B, T, D = x.shape
    n = -(-T // L)
    return F.pad(x, (0, 0, 0, n * L - T)).reshape(B * n, L, D)

def chunk_length(T: int, device: torch.device) -> int:
    """Tokens per chunk: about sqrt(T) / 2 on a CPU; few on a GPU, where every step is a launch."""
    return 16 if device.type == "cuda" else 2 ** max(4, math.ceil(math.log2(T) / 2) - 1)

def solve(cell: Cell, u: Tensor, s0: Tensor, guess: Optional[Tensor] = None
          ) -> tuple[Tensor, Tensor, int]:
    """The states that walk() gives, for all chunks of the text side by side.

    Cut the text into n chunks and guess the state before each. A sweep walks all of them at once,
    as one batch of B * n rows. Where a chunk ends elsewhere than the next was guessed to start, the
    guesses are corrected together: start_{j+1} = end_j + kept_j * (correction of start_j), a linear
    recurrence, solved by scan(). Newton's method would use each chunk's full Jacobian; the product
    of its forget gates is the cheap diagonal part (Lim et al., DEER, ICLR 2024). That changes how
    many sweeps it takes, not where it ends, which is the walk.

    u (B, T, ·), s0 (B, C), guess (B, T, C), as of the last iteration -> states (B, T, C), the
    chunks' starts (B, n, C), and the number of sweeps: 0 if it gave up and walked.
    """
    (B, T, _), C, L = u.shape, s0.shape[1], chunk_length(u.shape[1], u.device)
    chunks = chunked(u, L)
    n = len(chunks) // B
    starts = s0.new_zeros(B, n, C)
    if guess is not None:
        starts[:, 1:] = guess[:, L - 1:(n - 1) * L:L]
    starts[:, 0] = s0
    for sweep in range(1, MAX_SWEEPS + 1):
        states, kept = walk(cell, chunks, starts.view(B * n, C))
        kept, ends = kept.view(B, n, C), states[:, -1].view(B, n, C)
        change = scan(kept[:, :-1], ends[:, :-1] - starts[:, 1:])
        starts[:, 1:] += change
        size = starts.std(-1, keepdim=True).clamp(min=1e-3)[:, 1:]  # what is read is LayerNorm(s)
        if n == 1 or (change / size).abs().max() <= TOLERANCE:
            return states.view(B, n * L, C)[:, :T], starts, sweep
    states = walk(cell, u, s0)[0]
    starts[:, 1:] = states[:, L - 1:(n - 1) * L:L]
    return states, starts, 0

class ParallelStates(torch.autograd.Function):
    """solve() with its gradient: the same recurrence, run from right to left.

    Take two chunks. The loss reaches the second one's start by its states: call that m_2. It
    reaches the first one's start by its states, inside_1, and by its end, where the second starts:
    m_1 = inside_1 + J_1^T m_2, J_1 being the Jacobian of the end by the start. Autograd gives
    through_1 = J_1^T m_2 for any guess of m_2. Of n chunks, guess all m_j; were J_j the product of
    forget gates kept_j, one scan() would find the right ones; correct the guesses by that scan, and
    ask again until nothing changes. There the terms with kept_j cancel: it is the true gradient.
    """

    @staticmethod
    def forward(ctx, cell, u, s0, guess, *parameters):
        states, starts, sweeps = solve(cell, u, s0, guess)
        ctx.cell = cell
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
        for _ in range(MAX_SWEEPS if n > 1 else 0):
            later = F.pad(m[:, 1:], (0, 0, 0, 1))  # m_{j+1}, which arrives at the end of chunk j
            ends[:, -1] = later.reshape(B * n, C)
            through = torch.autograd.grad(states, starts, ends, retain_graph=True)[0]
            new = scan(kept.flip(1), (inside + through - kept * later).flip(1)).flip(1)
            change, m = (new - m).norm(), new
            if change <= 1e-3 * m.norm():
                break
        ends[:, -1] = F.pad(m[:, 1:], (0, 0, 0, 1)).reshape(B * n, C)
        gradients = torch.autograd.grad(states, (u, *ctx.cell.recurrent()), grad + ends)
        return None, gradients[0], m[:, 0], None, *gradients[1:]

# ------------------------------------------------------------------------------------------------
# 4. The model: the context block, the token block, the output head; how it writes

class Output(NamedTuple):
    loss: Optional[Tensor]
    logits: Tensor  # (B, T, V)
    state: Tensor   # (B, C), after the last token

class NewLLM(nn.Module, PyTorchModelHubMixin):
    """Context block, token block, and an output head whose table is that of the embeddings.

    With GPT-2's embeddings, and with --joint, it is the same table. Learned ones must not change
    under frozen contexts: there the head begins with a copy, and goes on learning.
    """

    def __init__(self, config: Config, vocab_size: int = 50259):
        super().__init__()
        self._hub_mixin_config = asdict(config) | dict(vocab_size=vocab_size)  # its config.json
        E, C, H = config.embed_dim, config.context_dim, config.hidden_dim
        self.config, self.sweeps = config, 0
        self.register_buffer("vocab", torch.arange(-3, vocab_size - 3))  # see Tokenizer
        self.embed, self.head = nn.Embedding(vocab_size, E), nn.Linear(E, vocab_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.copy_(self.embed.weight)
        if config.joint or config.embeddings != "learned":
            self.head.weight = self.embed.weight
        self.embed.requires_grad_(config.embeddings == "learned")
        self.cell = Cell(config)
        self.again = E if config.token_input_all_layers else 0
        widths = [E + C] + [H + self.again] * (config.num_layers - 1)
        self.hidden = nn.ModuleList(nn.Linear(width, H) for width in widths)
        self.out, self.dropout = nn.Linear(H, E), nn.Dropout(config.dropout)
        self.scale = nn.Parameter(torch.tensor(10.0))  # in Phase 1, 1 / temperature

    def read(self, ids: Tensor) -> Tensor:
        """x: ids (...) -> (..., E), normalised; of an unknown word only zeros are read."""
        return F.layer_norm(self.embed(ids), self.embed.weight.shape[1:]) * (ids != UNK)[..., None]

    def states(self, ids: Tensor, state: Optional[Tensor] = None, guess: Optional[Tensor] = None
               ) -> Tensor:
        """Context block: ids (B, T), state or None for zeros -> states (B, T, C), float32.

        guess (B, T, C): as in solve(). solver="auto": on a CPU the loop wins once some dialogues
        are walked side by side (python test_newllm.py shows it); on a GPU each step is a launch.
        """
        with torch.autocast(ids.device.type, enabled=False):
            u = self.cell.token_in(self.read(ids))
            s = u.new_zeros(len(u), self.config.context_dim) if state is None else state.float()
            wanted = dict(parallel=True, sequential=False, auto=u.is_cuda or len(u) <= 4)
            self.sweeps = 0
            if not wanted[self.config.solver] or u.shape[1] <= 32:
                return walk(self.cell, u, s)[0]
            states, self.sweeps = ParallelStates.apply(self.cell, u, s, guess,
                                                       *self.cell.recurrent())
            if self.sweeps == 0:
                say(f"solver: {MAX_SWEEPS} sweeps did not reach {TOLERANCE}; walked token by token")
            return states

    def query(self, ids: Tensor, states: Tensor) -> Tensor:
        """Token block, q = FNN([x, c]): ids (...), states (..., C) -> (..., E) of length 1."""
        x, c = self.read(ids), context(states)
        a = torch.cat((x, c), dim=-1)
        for k, layer in enumerate(self.hidden):
            a = torch.cat((a, x), dim=-1) if k and self.again else a
            a = self.dropout(F.silu(layer(a)))
        return F.normalize(self.out(a).float(), dim=-1)

    def logits(self, ids: Tensor, states: Tensor) -> Tensor:
        """Output head, of word w g cos(q, e_w) + b_w: ids (...), states (..., C) -> (..., V)."""
        q = self.scale * self.query(ids, states)
        return F.linear(q, F.normalize(self.head.weight, dim=-1), self.head.bias).float()

    def forward(self, input_ids: Tensor, labels: Optional[Tensor] = None,
                state: Optional[Tensor] = None) -> Output:
        """ids (B, T) -> logits (B, T, V) and the state after the last token. state: where another
        call ended. labels (B, T), as Hugging Face has them (-100: ignored) -> the mean loss too."""
        states = self.states(input_ids, state)
        logits, loss = self.logits(input_ids, states), None
        if labels is not None:
            z, y = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(z, y, reduction="sum") / (y != -100).sum().clamp(min=1)
        return Output(loss, logits, states[:, -1])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int = 100,
                 eos_token_id: Optional[int] = None, state: Optional[Tensor] = None,
                 **sampling) -> Tensor:
        """ids (B, T) -> (B, T + new), arguments as in Hugging Face's generate(); sampling as in
        choose(), state as in forward(). Rows that have ended are filled up with eos_token_id."""
        ids, unread, ended = input_ids, input_ids, input_ids.new_zeros(len(input_ids), dtype=bool)
        for _ in range(max_new_tokens):
            states = self.states(unread, state)
            state = states[:, -1]
            token = choose(self.logits(unread[:, -1], state), ids, **sampling)
            if eos_token_id is not None:
                token = torch.where(ended, eos_token_id, token)
                ended = ended | (token == eos_token_id)
            unread = token[:, None]
            ids = torch.cat((ids, unread), 1)
            if ended.all():
                break
        return ids

def choose(scores: Tensor, seen: Tensor, do_sample: bool = False, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0) -> Tensor:
    """The next token (B,) by logits (B, V) after the tokens seen (B, T); greedy by default."""
    said = torch.zeros_like(scores, dtype=torch.bool).scatter(1, seen, True)
    said[:, IM_END] = False  # answers could not end if it were punished
    factor = torch.where(scores < 0, repetition_penalty, 1 / repetition_penalty)
    scores = torch.where(said, scores * factor, scores)
    scores[:, [UNK, IM_START]] = -math.inf  # nobody says these
    if not do_sample:
        return scores.argmax(-1)
    scores = scores / max(temperature, 1e-5)
    if top_k:
        kth = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if top_p < 1:  # the fewest tokens whose probabilities add up to top_p (Holtzman et al. 2020)
        ordered, index = scores.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        scores = scores.scatter(1, index, ordered.masked_fill(before >= top_p, -math.inf))
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]

def answer(model: NewLLM, text: str, max_new_tokens: int = 200, **sampling) -> str:
    """The model's answer to one message."""
    tokenizer = Tokenizer(model.vocab)
    question = torch.tensor([tokenizer.question(text)], device=model.vocab.device)
    ids = model.eval().generate(question, max_new_tokens, IM_END, **sampling)
    return tokenizer.decode([i for i in ids[0, question.shape[1]:].tolist() if i != IM_END]).strip()

# ------------------------------------------------------------------------------------------------
# 5. Training: one loop for both phases

TABLES = ("embed.weight", "head.weight")  # whose learning rate is another
WARMUP, GAIN = 10, 1e-3  # steps in which the learning rate rises; what counts as a gain, in nats

class Phase:
    """What both phases share. They differ in what learns, how fast, and by which loss().

    loss() returns a loss to minimise and four sums, of which the second counts what was asked;
    figures() makes means of them, and `loss` among these is what is to fall.

    All that is random in a step follows from its number: to go on from a checkpoint, of which each
    epoch leaves one, gives to the last digit what an uninterrupted run of one process gives.
    """

    def __init__(self, model: NewLLM, train: list[Dialogue], val: list[Dialogue], learns: tuple):
        self.model, self.train, self.val, self.config = model, train, val, model.config
        self.device, self.states = model.vocab.device, None
        self.groups = [dict(params=[p], share=self.table_rate if n in TABLES else 1.0)
                       for n, p in model.named_parameters()
                       if n.startswith(learns) and p.requires_grad]
        self.dtype = getattr(torch, self.config.dtype, torch.float32)
        if self.config.dtype == "auto" and self.device.type == "cuda":
            recent = torch.cuda.get_device_capability(self.device)[0] >= 8
            self.dtype = torch.bfloat16 if recent else torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.parts = 0  # in which a step's batch is computed; 0: not known yet

    def fit(self, resumed: Optional[dict] = None):
        """Train until the epochs are over, or `patience` of them have gained nothing."""
        optimizer = torch.optim.AdamW(self.groups, self.rate, fused=True)
        epoch, best, waited = resumed["progress"] if resumed else (0, math.inf, 0)
        if resumed:
            optimizer.load_state_dict(resumed["optimizer"])
            self.scaler.load_state_dict(resumed["scaler"])
        batches, seed = batches_of(self.train, self.batch_tokens), self.config.seed
        out, writer = Path(self.config.out), None
        if self.config.tensorboard and RANK == 0:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(self.config.tensorboard)
        start, first = time.perf_counter(), epoch
        while epoch < self.epochs and not 0 < self.patience <= waited:
            order, sums = random.Random(seed + epoch).sample(batches, len(batches)), 0.0
            for step, batch in enumerate(tqdm(order, self.name, disable=None, leave=False),
                                         epoch * len(batches)):
                fall = math.cos(math.pi * step / (self.epochs * len(batches))) / 2 + 0.5
                for group in optimizer.param_groups:
                    group["lr"] = group["share"] * self.rate * fall * min(1, (step + 1) / WARMUP)
                sums += self.step(optimizer, batch, seed + step)
            figures = self.figures(sums)
            if self.val:
                figures |= {f"held-out {k}": v for k, v in self.evaluate(self.val).items()}
            goal = figures.get("held-out loss", figures["loss"])
            gained = goal < best - GAIN
            epoch, waited = epoch + 1, 0 if gained else waited + 1
            best = goal if gained else best
            left = (time.perf_counter() - start) / (epoch - first) * (self.epochs - epoch)
            say(f"{epoch:5d} of {self.epochs} | " + " | ".join(
                f"{k} {v:.4g}" for k, v in figures.items()) + f" | {left:.0f} s left")
            for k, v in figures.items() if writer else ():
                writer.add_scalar(f"{self.name}/{k}", v, epoch)
            checkpoint = dict(config=asdict(self.config), model=self.model.state_dict(),
                              phase=self.name, progress=(epoch, best, waited), figures=figures,
                              optimizer=optimizer.state_dict(), scaler=self.scaler.state_dict())
            if gained:
                save(out / f"{self.name}-best.pt", checkpoint)
            states = self.states if self.name == "phase1" else None  # Phase 2's are made anew
            save(out / f"{self.name}-last.pt", checkpoint | dict(states=states))
        if WORLD > 1:
            dist.barrier()
        if self.keep_best:
            self.model.load_state_dict(read_checkpoint(out / f"{self.name}-best.pt")["model"])

    def step(self, optimizer, batch: list[int], seed: int) -> Tensor:
        """One optimizer step on a batch of dialogues; the sums that the loss returns.

        Each of several processes computes its share, in parts that fit into its memory, and the
        gradients are summed. On a GPU the first step is taken in up to eight parts, and what memory
        they took says how few will do; elsewhere a part has about 8,192 tokens.
        """
        mine, free = batch[RANK::WORLD], free_memory(self.device)[1]
        measured = self.device.type != "cuda" or self.parts
        parts = self.parts or (-(-self.batch_tokens // 8192) if measured else min(8, len(mine)))
        while True:
            try:
                optimizer.zero_grad()
                sums = torch.zeros(4, device=self.device)
                for part in filter(None, (mine[k::parts] for k in range(parts))):
                    torch.manual_seed(seed)  # parts and processes draw the same negatives
                    with torch.autocast(self.device.type, self.dtype,
                                        enabled=self.dtype != torch.float32):
                        loss, found = self.loss(self.train, part)
                    self.scaler.scale(loss).backward()
                    sums += found
                break
            except torch.OutOfMemoryError:
                if parts >= len(mine):
                    raise UserError("not even one dialogue fits into the device's memory; lower "
                                    "--hidden-dim or --max-len, or use --device cpu") from None
                parts, measured, loss = 2 * parts, True, None
                say(f"memory: too little; a step is now computed in {parts} parts")
        if not measured:
            needed = parts * (free - free_memory(self.device)[0])
            parts = max(1, math.ceil(needed / (0.8 * free)))
            say(f"memory: a step takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: it is "
                f"computed in {parts} part(s)")
        self.parts, sums = parts, global_sum(sums)
        if not sums[0].isfinite():
            raise UserError(f"the loss is {sums[0]:.1f}; train anew with a lower --learning-rate; "
                            f"the last good checkpoint is in {self.config.out}")
        parameters = [group["params"][0] for group in optimizer.param_groups]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            global_sum(p.grad).div_(sums[1].clamp(min=1))
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        return sums.cpu()

    @torch.no_grad()
    def evaluate(self, dialogues: list[Dialogue]) -> dict[str, float]:
        """The figures of dialogues that are not trained on."""
        torch.manual_seed(self.config.seed)
        sums = torch.zeros(4, device=self.device)
        for part in batches_of(dialogues, 8192)[RANK::WORLD]:
            sums += self.loss(dialogues, part)[1]
        return self.figures(global_sum(sums).cpu())

def batches_of(dialogues: list[Dialogue], tokens: int) -> list[list[int]]:
    """Indices of dialogues of like length, at most `tokens` together with padding, or one."""
    batches = []
    for i in sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].ids)):
        if not batches or (len(batches[-1]) + 1) * len(dialogues[i].ids) > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches

def pad(tensors: list[Tensor], device) -> Tensor:
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)

def collate(dialogues: list[Dialogue], indices: list[int], device) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T) int64, targets (B, T) bool and real (B, T) bool, which is False on padding."""
    ids, mask = zip(*(dialogues[i] for i in indices))
    return pad(ids, device), pad(mask, device), pad([torch.ones_like(m) for m in mask], device)

@torch.no_grad()
def all_states(model: NewLLM, dialogues: list[Dialogue], holes: float = 0) -> list[Tensor]:
    """The states (T, C) of each dialogue, on the CPU."""
    states = [None] * len(dialogues)
    for batch in tqdm(batches_of(dialogues, 8192), "contexts", disable=None, leave=False):
        ids = with_holes(collate(dialogues, batch, model.vocab.device)[0], holes)
        for i, s in zip(batch, model.states(ids).cpu()):
            states[i] = s[:len(dialogues[i].ids)].clone()
    return states

def with_holes(ids: Tensor, share: float) -> Tensor:
    """ids (B, T) with a share of them hidden: as <unk>, of which nothing is read."""
    return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < share, UNK)

# ------------------------------------------------------------------------------------------------
# 6. Phase 1: learn the contexts of all tokens at once, without a softmax over the vocabulary

NEGATIVES, DIVERSITY, CONVERGED = 1023, 0.9, 0.01  # wrong words; w; mean squared change

class Phase1(Phase):
    """Contexts that settle and differ: loss = (1 - w) CVFP + w diversity, w being DIVERSITY.

    CVFP, context vector fixed point, is the mean squared change of a context since the last
    iteration. Diversity is asked for by InfoNCE (van den Oord et al. 2018): tell the next word from
    NEGATIVES others, by the token block's own score. That is alignment and uniformity (Wang & Isola
    2020), and uniformity is diversity, spent on what tells words apart.
    """
    name, rate, table_rate, patience, keep_best = "phase1", 2e-3, 1.0, 2, True

    def __init__(self, model: NewLLM, train: list[Dialogue], val: list[Dialogue],
                 states: Optional[list[Tensor]] = None):
        super().__init__(model, train, val, ("cell", "hidden", "out", "embed"))
        self.epochs, self.states, start = self.config.iterations, states, time.perf_counter()
        self.batch_tokens = max(1, min(4096, tokens_in(train) // 16))  # little text: small steps
        self.often = torch.bincount(torch.cat([d.ids for d in train])).double().sqrt()
        if not states and fits(train, self.config):  # iteration 0, token by token
            model.config = replace(self.config, solver="sequential")
            self.states, model.config = all_states(model, train), self.config
        say(f"\nPhase 1: {tokens_in(train):,} tokens walked one by one in "
            f"{time.perf_counter() - start:.1f} s, now at most {self.epochs} passes in parallel\n"
            f"  loss: nats it takes to tell the next word from {NEGATIVES:,} others; 0 is best\n"
            f"  change: of contexts since the last pass; converged: mean square below {CONVERGED}\n"
            f"  rank: share of its dimensions that the contexts use; sweeps: of the solver")

    def loss(self, dialogues: list[Dialogue], part: list[int]) -> tuple[Tensor, Tensor]:
        """Of some dialogues: loss; sums of contrast, tokens, changes and converged contexts."""
        self.model.eval()  # no dropout
        negatives = torch.multinomial(self.often, NEGATIVES, True).to(self.device)
        ids, _, real = collate(dialogues, part, self.device)
        known = self.states is not None and dialogues is self.train
        before = pad([self.states[i] for i in part], self.device) if known else None
        states, asked = self.model.states(ids, guess=before), (real & (ids != UNK))[:, 1:]
        q, y = self.model.query(ids[:, :-1][asked], states[:, :-1][asked]), ids[:, 1:][asked]
        table = F.normalize(self.model.embed.weight, dim=-1)
        right = (q * table[y]).sum(-1, keepdim=True)
        wrong = (q @ table[negatives].T).masked_fill(y[:, None] == negatives, -math.inf)
        scores = self.model.scale.detach() * torch.cat((right, wrong), 1)
        contrast = F.cross_entropy(scores, torch.zeros_like(y), reduction="sum")
        change = states.new_zeros(1)
        if known:
            change = (context(states) - context(before))[:, 1:][real[:, 1:]].pow(2).mean(-1)
            for i, s in zip(part, states.detach().cpu()):
                self.states[i] = s[:len(dialogues[i].ids)].clone()
        sums = (contrast, asked.sum(), change.sum(), (change < CONVERGED).sum())
        return ((1 - DIVERSITY) * change.sum() + DIVERSITY * contrast,
                torch.stack(sums).detach().float())

    def figures(self, sums: Tensor) -> dict[str, float]:
        contrast, change, converged = (sums / sums[1])[[0, 2, 3]].tolist()
        if not torch.is_grad_enabled() or self.states is None:
            return dict(loss=contrast)
        return dict(loss=contrast, change=change, converged=converged, sweeps=self.model.sweeps,
                    rank=effective_rank(torch.cat(self.states[:256])))

    @torch.no_grad()
    def report(self):
        """Say whether Phase 2's contexts are those of a chat, and warn of two ways to fail."""
        longest, walked = sorted(self.train, key=lambda d: len(d.ids))[-4:], []
        for d in longest:  # as a chat reads: one after the other
            u = self.model.cell.token_in(self.model.read(d.ids[None].to(self.device)))
            walked.append(walk(self.model.cell, u, u.new_zeros(1, self.config.context_dim))[0][0])
        walked = torch.cat(walked).cpu()
        c, w = context(torch.cat(all_states(self.model, longest))), context(walked)
        same = F.cosine_similarity(walked[1:], walked[:-1]).mean().item()
        alike = F.normalize(c, dim=-1).mean(0).pow(2).sum().item()
        say(f"contexts are {(c - w).pow(2).mean():.0e} from the token loop's, mean square (2 is "
            f"unrelated); cosine of two {alike:.2f}, of a state and the next {same:.2f}")
        if same > 0.99:
            say("warning: identity mapping, the state hardly changes; give more --samples")
        if alike > 0.95:
            say("warning: global attractor, all contexts are alike; raise --context-dim")

def fits(dialogues: list[Dialogue], config: Config) -> bool:
    """Whether the states of all tokens may be kept in memory, 4 bytes a number."""
    return tokens_in(dialogues) * config.context_dim * 4 <= config.cache_gb * 1e9

def effective_rank(states: Tensor) -> float:
    """exp(entropy of normalised singular values) / C of states (N, C) (Roy & Vetterli 2007)."""
    c = context(states[::max(1, len(states) // 4096)])
    p = torch.linalg.svdvals(c - c.mean(0))
    p = (p / p.sum()).clamp(min=1e-12)
    return torch.exp(-(p * p.log()).sum()).item() / c.shape[1]

# ------------------------------------------------------------------------------------------------
# 7. Phase 2: learn to predict the assistant's words

HOLES = 1 / 3  # share of the words that the context block is not shown

class Phase2(Phase):
    """Cross entropy of the assistant's words, with the token block that Phase 1 has begun.

    Where new text is to be predicted, a share HOLES of the words is hidden from the context block.
    Contexts that know the text by heart would teach the token block to trust them more than it can
    in a chat. Validation is without holes, as a chat is.
    """
    name, table_rate = "phase2", 0.2  # the table overfits first

    def __init__(self, model: NewLLM, train: list[Dialogue], val: list[Dialogue]):
        config = model.config
        super().__init__(model, train, val, ("hidden", "out", "scale", "head")
                         + ("embed", "cell") * config.joint)
        self.epochs, self.rate, self.patience = config.epochs, config.learning_rate, config.patience
        self.batch_tokens, self.keep_best = config.batch_tokens, not config.by_heart
        self.holes = 0 if config.by_heart else HOLES
        if fits(train, config) and not config.joint:
            torch.manual_seed(config.seed)
            self.states = all_states(model, train, self.holes)
        how = ("context and token block learn together" if config.joint else "contexts are frozen"
               + ("" if self.states else " and computed again for each batch"))
        say(f"\nPhase 2: {targets_in(train):,} words to predict; {how}\n"
            f"  loss: nats per word; perplexity: e^loss; right: share of words it would have said")

    def loss(self, dialogues: list[Dialogue], part: list[int]) -> tuple[Tensor, Tensor]:
        """Of some dialogues: loss; sums of it, of words, of words that were right."""
        training = dialogues is self.train
        self.model.train(training)
        ids, mask, _ = collate(dialogues, part, self.device)
        if training and self.states:
            states = pad([self.states[i] for i in part], self.device)
        else:
            with torch.set_grad_enabled(self.config.joint and training):
                states = self.model.states(with_holes(ids, self.holes) if training else ids)
        at = mask[:, 1:]
        z, y = self.model.logits(ids[:, :-1][at], states[:, :-1][at]), ids[:, 1:][at]
        loss, right = F.cross_entropy(z, y, reduction="sum"), (z.argmax(-1) == y).sum()
        return loss, torch.stack([loss, at.sum(), right, right * 0]).detach()

    def figures(self, sums: Tensor) -> dict[str, float]:
        loss, right = (sums / sums[1])[[0, 2]].tolist()
        return dict(loss=loss, perplexity=math.exp(min(loss, 99)), right=right)

# ------------------------------------------------------------------------------------------------
# 8. Helpers that a first reading may skip: processes, files, devices; and main()

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun

def global_sum(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x

def say(text: str):
    """Print, on the first of several processes only."""
    if RANK == 0:
        print(text, flush=True)

def in_notebook() -> bool:
    return hasattr(builtins, "__IPYTHON__")

def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")

def cause(error: Exception) -> str:
    """The first line of an error, short enough for ours."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:150]

def write(path: Path, fill) -> Path:
    """Make a file by fill(open file), whole or not at all. Raises UserError if it cannot be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError where a disk is full
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({cause(e)}); free some space, or name another "
                        f"folder with --out or --cache") from None
    return path

def save(path: Path, checkpoint: dict):
    if RANK == 0:
        write(path, lambda file: torch.save(checkpoint, file))

def read_checkpoint(path: Path) -> dict:
    """What save() wrote; no code in it is run. UserError if it is damaged or of another kind."""
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
        model_of(checkpoint)
        return checkpoint
    except Exception as e:  # damaged bytes raise anything
        raise UserError(f"{path} is missing, damaged or of another version of New-LLM ({cause(e)})"
                        f"; name another folder") from None

def model_of(checkpoint: dict) -> NewLLM:
    model = NewLLM(Config(**checkpoint["config"]), len(checkpoint["model"]["vocab"]))
    model.load_state_dict(checkpoint["model"])
    return model

def pick_device(name: str) -> torch.device:
    """cuda > mps > cpu, or what the user says. Raises UserError for a device that is not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    found = [kind for kind in there if there[kind]]
    if name != "auto" and not re.fullmatch(rf"({'|'.join(found)})(:\d+)?", name):
        raise UserError(f"--device {name} is not there; this machine has {', '.join(found)}")
    kind = found[0] if name == "auto" else name
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)

def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that were free at the peak since the last call, and that are free now."""
    if device.type != "cuda":
        return 0, 0
    used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return free - peak, free - used

def gpt2_table(name: str, cache: str) -> Tensor:
    """GPT-2's embeddings (50257, 768): wte.weight of a .safetensors file, or of the hub's, of which
    only these 154 of 548 MB are read, once. Raises UserError."""
    from safetensors.torch import load_file, save as to_bytes
    path = Path(cache) / "gpt2-wte.safetensors" if name in ("auto", "gpt2") else Path(name)
    if name in ("auto", "gpt2") and not path.exists():
        try:
            HfApi().model_info("openai-community/gpt2", timeout=5)  # fails at once without network
            hub, file = HfFileSystem(), "openai-community/gpt2/model.safetensors"
            say("embeddings: downloading GPT-2's, 154 MB")
            size = int.from_bytes(hub.cat_file(file, 0, 8), "little")
            header = json.loads(hub.cat_file(file, 8, 8 + size))["wte.weight"]
            begin, end = (8 + size + offset for offset in header["data_offsets"])
            data = bytearray(hub.cat_file(file, begin, end))
        except Exception as e:  # whatever the network does
            raise UserError(f"GPT-2's embeddings cannot be downloaded ({cause(e)})") from None
        table = torch.frombuffer(data, dtype=torch.float32).view(header["shape"])
        write(path, lambda file: file.write(to_bytes({"wte.weight": table})))
    try:
        tensors = {k.removeprefix("transformer."): t for k, t in load_file(path).items()}
    except Exception as e:  # a damaged file raises anything
        raise UserError(f"--embeddings {path}: {cause(e)}; give auto, gpt2, learned or a "
                        f".safetensors file") from None
    shape = tuple(tensors["wte.weight"].shape) if "wte.weight" in tensors else "missing"
    if shape != (50257, 768):
        raise UserError(f"--embeddings {path}: wte.weight is {shape}, GPT-2's is (50257, 768)")
    return tensors["wte.weight"].float()

def make_model(config: Config, vocab: Tensor) -> NewLLM:
    """A fresh model with the embeddings that --embeddings asks for, or UserError."""
    table = None
    try:
        if config.embeddings != "learned":
            table = gpt2_table(config.embeddings, config.cache)
            config = replace(config, embed_dim=table.shape[1])
    except UserError as e:
        if config.embeddings != "auto":
            raise
        say(f"embeddings: {e}; learned instead")
        config = replace(config, embeddings="learned")
    torch.manual_seed(config.seed)
    model = NewLLM(config, len(vocab))
    model.vocab.copy_(vocab)
    if table is not None:
        nn.init.normal_(model.embed.weight, std=table.std().item())  # for <unk> and ChatML's two
        model.embed.weight.data[3:] = table[vocab[3:]]
    return model

def show_data(dialogues: list[Dialogue], tokenizer: Tokenizer):
    """Print dialogues as the model sees them, targets in green, or in [brackets] in a file."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() or in_notebook() else ("[", "]")
    for number, d in enumerate(dialogues, 1):
        print(f"--- dialogue {number}: {len(d.ids)} tokens, {targets_in([d])} of them targets")
        for target, part in itertools.groupby(range(len(d.ids)), key=lambda i: bool(d.mask[i])):
            text = tokenizer.decode(d.ids[list(part)].tolist())
            print(on + text + off if target else text, end="")

def train_model(config: Config, resumed: Optional[dict]) -> Optional[NewLLM]:
    """Both phases. Returns the model to chat with."""
    train, val, vocab = load(config)
    if config.show_data:
        return show_data(train[:config.show_data], Tokenizer(vocab))
    for folder in (config.out, config.cache):  # better to learn it now than after an hour
        write(Path(folder) / ".writable", lambda file: None).unlink(missing_ok=True)
    device = pick_device(config.device)
    model = (model_of(resumed) if resumed else make_model(config, vocab)).to(device)
    if not torch.equal(model.vocab.cpu(), vocab):
        raise UserError(f"--resume: {config.data} is not what it was; train anew in another --out")
    model.config = config = replace(config, embeddings=model.config.embeddings,
                                    embed_dim=model.config.embed_dim)
    count = {name: p.numel() for name, p in model.named_parameters()}
    tables = sum(n for name, n in count.items() if name in TABLES)
    say(f"model: {sum(count.values()) - tables:,} parameters, {tables:,} of embeddings, {device}")
    if not resumed or resumed["phase"] == "phase1":
        with torch.no_grad():  # the probe is for those who edit the cell
            reads = [getattr(config, name) for name in PHASE_1_READS]
            probe = model.states(train[0].ids[None].to(device)).mean().item()
        texts = [vocab.tolist(), *(d.ids.tolist() for d in train + val)]
        key = json.dumps([reads, NEGATIVES, DIVERSITY, texts, probe])
        done = Path(config.cache) / f"phase1-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if done.exists() and not resumed:
            model.load_state_dict(read_checkpoint(done)["model"])
            say(f"\nPhase 1: done before with the same data and settings, found in {done}")
        elif config.iterations:
            phase = Phase1(model, train, val, resumed and resumed["states"])
            phase.fit(resumed)
            phase.report()
            save(done, dict(config=asdict(config), model=model.state_dict()))
        model.head.weight.data.copy_(model.embed.weight)
        resumed = None
    Phase2(model, train, val).fit(resumed)
    return model.eval()

def earlier_run(config: Config, typed: dict) -> tuple[Config, dict]:
    """For --resume: the config of the last checkpoint, with what may change changed, and itself."""
    found = sorted(Path(config.out).glob("phase?-last.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"--resume: no checkpoint in {config.out}; train first, or name its --out")
    checkpoint = read_checkpoint(found[-1])
    old = Config(**checkpoint["config"])
    for name in typed.keys() - set(MAY_CHANGE):
        if typed[name] != getattr(old, name) and (name, typed[name]) != ("embeddings", "auto"):
            raise UserError(f"--resume: {found[-1]} was trained with {flag_of(name)} "
                            f"{getattr(old, name)}, not {typed[name]}; leave that out, or train "
                            f"anew in another --out")
    return replace(old, **{k: v for k, v in typed.items() if k in MAY_CHANGE}), checkpoint

def main(argv: Optional[list[str]] = None) -> Optional[NewLLM]:
    """Train as the options say, which in a notebook are not the kernel's own. Returns the model."""
    start = time.perf_counter()
    torch.set_flush_denormal(True)  # numbers near 1e-40 make exp ten times slower
    try:
        config, typed = parse(argv if argv is not None else [] if in_notebook() else sys.argv[1:])
        config, resumed = earlier_run(config, typed) if config.resume else (config, None)
        if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
            device = pick_device(config.device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if config.data == Config.data and not Path(config.data).exists():
            config = replace(config, data="ultrachat")
            say(f"data: no {Config.data} here, as when pasted into a notebook; UltraChat instead")
        model = train_model(config, resumed)
        if model and RANK == 0:
            where = "" if config.out == Config.out else f" --checkpoint {config.out}"
            print(f"\ndone in {time.perf_counter() - start:.0f} s, checkpoints in {config.out}/\n\n"
                  f"You: who are you?\nNew-LLM: {answer(model, 'who are you?')}\n\n"
                  f"chat with it: python chat.py{where}")
        return model
    except (UserError, ModuleNotFoundError) as e:
        if in_notebook():
            raise
        hint = f"; pip install {e.name}" if isinstance(e, ImportError) else ""
        print(f"newllm.py: {e}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; passes that were finished are saved: go on with --resume")

if __name__ == "__main__":
    main()
