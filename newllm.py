"""New-LLM: a language model without attention, in one file you can read from top to bottom.

All that the model remembers of a text is one vector of fixed size, the state. A token changes it,
the next word is read from it, and it is handed on to the next token: a chat costs the same memory
and the same time per token after ten tokens and after a million. Training has two phases: Phase 1
learns the states of all tokens in parallel, Phase 2 freezes what makes them and learns to speak.

    python newllm.py --small                       learn ten dialogues by heart, in seconds
    python newllm.py --medium --data mine.jsonl    all of your own by heart
    python newllm.py --large --samples 5000        UltraChat, to answer new questions
    python chat.py                                 chat with what was trained

The letters that the code and its comments use:
    B, T      dialogues in a batch, tokens in a dialogue
    V         vocabulary: <unk>, two tokens of ChatML, and GPT-2's tokens that the text has
    E, C, H   embed_dim, context_dim, hidden_dim
    x         embedded, normalised tokens                  (B, T, E)
    u         what they add to the hidden layers           (B, T, H or H * num_layers)
    s         the state that goes from token to token      (B, C)
    c         the context, LayerNorm(s): what is read      (B, C)
"""
import argparse, builtins, contextlib, itertools, json, math, os, random, sys, tempfile, time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait give way on a busy machine
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, HfFileSystem, PyTorchModelHubMixin
from torch import Tensor, distributed as dist, nn
from tqdm import tqdm

# --- 1. Configuration: the command line is made from these fields, val_data becomes --val-data ----
class UserError(ValueError):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""

SHIPPED = "data/chats.jsonl" if Path("data/chats.jsonl").exists() else "ultrachat"

def option(group, default, help, choices=None, least=1, most=1e30):
    """A field of Config, and how the command line shows and checks it."""
    return field(default=default, metadata=locals())

@dataclass
class Config:
    """Every setting of a run. A preset changes some defaults, the command line any of them."""
    data: str = option("data", SHIPPED, "ultrachat, a hub dataset, .jsonl or .txt file")
    val_data: str = option("data", "", "the same kinds, to validate on")
    samples: int = option("data", 10, "dialogues to read; 0: all, as with a file of yours", least=0)
    max_len: int = option("data", 512, "tokens after which a dialogue is cut", least=2)
    embeddings: str = option("model", "learned", "learned, gpt2 (frozen), auto (either), or a file")
    embed_dim: int = option("model", 256, "E, if learned; GPT-2's have 768", least=2)
    num_layers: int = option("model", 1, "hidden layers of the context block")
    context_dim: int = option("model", 128, "C, numbers in the state", least=2)
    hidden_dim: int = option("model", 128, "H, units of a hidden layer")
    token_input_all_layers: bool = option("model", False, "feed the token to later hidden layers")
    dropout: float = option("model", 0.0, "share of x and of c dropped", least=0, most=1)
    solver: str = option("model", "auto", "of the states", ("auto", "parallel", "sequential"))
    joint: bool = option("model", False, "Phase 2 trains the context block too")
    seed: int = option("model", 42, "of everything random", least=0, most=2 ** 31)
    iterations: int = option("Phase 1", 20, "at most so many passes; 0: no Phase 1", least=0)
    learning_rate: float = option("Phase 1", 4e-3, "AdamW's peak, of both phases", least=1e-9)
    batch_tokens: int = option("Phase 1", 64, "of an optimizer step, in both phases")
    epochs: int = option("Phase 2", 20, "passes over the data")
    patience: int = option("Phase 2", 0, "above 0: hold out, end after so many in vain", least=0)
    device: str = option("machine", "auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("machine", "auto", "of what scores words", ("auto", "float32", "bfloat16"))
    cache_gb: float = option("machine", 4.0, "GB for states; 0: made anew each pass", least=0)
    out: str = option("machine", "checkpoints", "folder of the checkpoints")
    cache: str = option("machine", "cache", "folder of downloads")
    resume: bool = option("machine", False, "go on from the last checkpoint in --out")
    tensorboard: str = option("machine", "", "folder for TensorBoard's logs")
    show_data: int = option("machine", 0, "only print so many dialogues, targets marked", least=0)

    def __post_init__(self):
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata["least"], f.metadata["most"]
            if f.type in (int, float) and not least <= value <= most:
                raise UserError(f"{flag(f.name)} {value}: give {least:g} to {most:g}")

PRESETS = {  # what it is for, and what it changes
    "small": ("ten dialogues by heart, in seconds (this is the default)", {}),
    "medium": ("100 dialogues of UltraChat by heart", dict(
        data="ultrachat", samples=100, embeddings="auto", context_dim=384, hidden_dim=384,
        iterations=16, epochs=8, batch_tokens=1024)),
    "large": ("1,000 dialogues of UltraChat, to answer new questions", dict(
        data="ultrachat", samples=1000, max_len=1024, embeddings="auto", context_dim=600,
        hidden_dim=600, dropout=0.5, iterations=24, epochs=12, patience=2, learning_rate=2e-3,
        batch_tokens=2048))}

def parse(argv: list[str]) -> Config:
    """The command line as a Config."""
    parser = argparse.ArgumentParser(
        "newllm.py", "newllm.py [options]", __doc__.partition("\nThe letters")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    def fail(message):
        raise UserError(f"{message} (python newllm.py --help lists the options)")
    parser.error = fail
    presets = parser.add_argument_group("start here").add_mutually_exclusive_group()
    for name, (about, changes) in PRESETS.items():
        presets.add_argument(f"--{name}", dest="preset", action="store_const", const=changes,
                             default={}, help=about)
    for title, members in itertools.groupby(fields(Config), lambda f: f.metadata["group"]):
        group = parser.add_argument_group(title)
        for f in members:
            kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                    dict(type=f.type, choices=f.metadata["choices"]))
            about = f"{f.metadata['help']} (small: {f.default if f.default != '' else 'none'})"
            group.add_argument(flag(f.name), default=argparse.SUPPRESS, help=about, **kind)
    typed = vars(parser.parse_args(argv))
    everything = dict(samples=0) if "data" in typed and is_file(typed["data"]) else {}
    return Config(**typed.pop("preset") | everything | typed)

# --- 2. Data: dialogues in; token ids, and a mask of the assistant's words, out -------------------
UNK, IM_START, IM_END = 0, 1, 2  # a word that the training text lacks; ChatML's begin and end

class Dialogue(NamedTuple):
    ids: Tensor   # (T,) int64
    mask: Tensor  # (T,) bool, True on what is to be predicted: an answer and its <|im_end|>

class Tokenizer:
    """Text to token ids and back: GPT-2's byte pairs (r50k_base of github.com/openai/tiktoken).
    vocab (V,) says which byte pair an id stands for, from 3 on; None: all 50,256 in their order."""
    def __init__(self, vocab: Tensor | None = None):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "data")  # which has it, or will have it
        with explained("no tokenizer", "pip install tiktoken; go online once or start above data/"):
            import tiktoken
            self.pairs = tiktoken.get_encoding("r50k_base")
        self.vocab = torch.arange(-3, 50256) if vocab is None else vocab.cpu()
        self.id_of = {pair: i for i, pair in enumerate(self.vocab.tolist()) if pair >= 0}
        self.alike = {self.bare(pair): i for pair, i in self.id_of.items()}

    def bare(self, pair: int) -> bytes:
        """A byte pair's text without capitals and spaces."""
        return self.pairs.decode_single_token_bytes(pair).strip().lower()

    def encode(self, text: str) -> list[int]:
        """Text is never mistaken for a special token: a typed <|im_end|> is seven ordinary ones.
        Where the vocabulary lacks `Tell`, it is read as `tell` or ` tell`."""
        return [self.id_of.get(pair) or self.alike.get(self.bare(pair), UNK)
                for pair in self.pairs.encode_ordinary(text)]

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
        return self.dialogue([("user", text), ("assistant", "")]).ids.tolist()[:-2]

def is_file(name: str) -> bool:
    """A local file, existing or meant; anything else is a name on the Hugging Face hub."""
    return Path(name).suffix in (".jsonl", ".json", ".txt") or Path(name).exists()

def download(name: str, split: str, most: int, config: Config) -> Path:
    """The first dialogues of a dataset on the hub, streamed into a .jsonl file in the cache."""
    if name == "ultrachat":
        name, split = "HuggingFaceH4/ultrachat_200k", f"{split}_sft"
    path = Path(config.cache, f"{name.replace('/', '--')}-{split}-{most or 'all'}.jsonl")
    if not path.exists():
        with explained(f"cannot read dataset {name}, split {split}",
                       "offline, use the shipped dialogues: --data data/chats.jsonl"):
            HfApi().dataset_info(name, timeout=5)  # datasets alone would try for half a minute
            import datasets
            records = datasets.load_dataset(name, split=split, streaming=True)
            records = tqdm(itertools.islice(records, most or None), name, disable=None)
            lines = [json.dumps(dict(messages=record["messages"])) + "\n" for record in records]
        save(path, lambda file: file.write_text("".join(lines), "utf-8"))
    return path

def messages_in(text: str, path: Path) -> Iterator[list[tuple[str, str]]]:
    """Dialogues of JSON lines, or of a JSON array, in UltraChat's form, as (role, text) pairs."""
    with explained(f"{path} is not JSON", "give one array, or an object per line"):
        lines = map(json.dumps, json.loads(text)) if text.lstrip()[:1] == "[" else text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with explained(f"{path} line {number} is not JSON with messages", "see README.md"):
                messages = [(m["role"], m["content"]) for m in json.loads(line)["messages"]]
                roles = {role for role, said in messages if said.strip()}
                if not {"assistant"} <= roles <= {"system", "user", "assistant"}:
                    raise ValueError(f"roles {sorted(roles)}")
            yield messages

def read(name: str, split: str, most: int, config: Config, tokenizer: Tokenizer) -> list[Dialogue]:
    """The first `most` dialogues of a file or a dataset, 0: all, cut at max_len; of a .txt file
    pieces, every token a target, about ten where some are to be held out."""
    path = Path(name) if is_file(name) else download(name, split, most, config)
    limit = config.max_len
    with explained(f"cannot read {path}", "give a .jsonl, .json or .txt file in UTF-8"):
        text = path.read_text("utf-8-sig")
    if path.suffix == ".txt":
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
        size = min(limit, math.ceil(len(ids) / 10)) if config.patience else limit
        found = [Dialogue(p, torch.ones_like(p, dtype=bool)) for p in ids.split(max(2, size))]
    else:
        found = map(tokenizer.dialogue, messages_in(text, path))
    found = list(itertools.islice(found, most or None))
    used = [Dialogue(d.ids[:limit], d.mask[:limit]) for d in found if d.mask[1:limit].any()]
    cut = sum(len(d.ids) > limit for d in found)
    print(f"{path}: {len(found)} dialogues, {cut} cut at {limit} tokens, "
          f"{len(found) - len(used)} without an answer left out")
    return used

def load(config: Config) -> tuple[list[Dialogue], list[Dialogue], Tensor]:
    """Dialogues to train on, to validate on, and the vocabulary of the former. Raises UserError."""
    tokenizer = Tokenizer()
    train, val = read(config.data, "train", config.samples, config, tokenizer), []
    if config.val_data:
        most = 0 if is_file(config.val_data) else 100
        val = read(config.val_data, "test", most, config, tokenizer)
    elif config.patience:  # every tenth dialogue, or the end of a text
        tenth = train[-max(1, len(train) // 10):]
        val = tenth if config.data.endswith(".txt") else train[9::10] or tenth
    held_out = {tuple(d.ids.tolist()) for d in val}
    train = [d for d in train if tuple(d.ids.tolist()) not in held_out]
    used, train, known = renumbered(train, val)
    if not train or not known and (config.val_data or config.patience):
        raise UserError(f"{config.data}: {len(train)} dialogues to train on, {len(known)} others: "
                        "too few; see --val-data and --max-len")
    tokens, targets = count(train)
    print(f"data: {len(train)} dialogues, {tokens:,} tokens, {targets:,} targets, V={len(used):,}")
    print(f"held out: {len(val)} dialogues; {1 - count(known)[1] / count(val)[1]:.1%} of their "
        "targets do not occur in the text to learn and do not count" if val else
        "held out: none, all is learned by heart and the figures are those of these dialogues")
    return train, known, tokenizer.vocab[used]

def renumbered(train: list[Dialogue], *others: list[Dialogue]) -> tuple:
    """The tokens that `train` uses, counted from 0 on, and all dialogues in these numbers. What
    `train` lacks becomes UNK, which is no target; dialogues without a target are left out."""
    used = torch.cat([torch.arange(3), *(d.ids for d in train)]).unique()
    number = torch.zeros(50259, dtype=torch.long)
    number[used] = torch.arange(len(used))
    new = ([Dialogue(number[ids], mask & (number[ids] != UNK)) for ids, mask in part]
           for part in (train, *others))
    return used, *([d for d in part if d.mask[1:].any()] for part in new)

def count(dialogues: list[Dialogue]) -> tuple[int, int]:
    """Tokens and targets."""
    return sum(len(d.ids) for d in dialogues), sum(int(d.mask[1:].sum()) for d in dialogues)

# --- 3. The contexts: one cell, walked token by token or solved for all tokens at once ------------
TOLERANCE, MAX_SWEEPS = 5e-5, 30  # of solve(): relative change that ends it; most sweeps
FEW, SHORT = 4, 32  # on a CPU walk() is faster for over FEW dialogues, or up to SHORT tokens

class Cell(nn.Module):
    """One step of the recurrence: (u_t, s_{t-1}) -> s_t."""
    def __init__(self, config: Config):
        super().__init__()
        E, C, H, layers = config.embed_dim, config.context_dim, config.hidden_dim, config.num_layers
        self.token_in = nn.Linear(E, H * (layers if config.token_input_all_layers else 1))
        self.state_in = nn.Linear(C, H, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(H, H) for _ in range(layers - 1))
        self.gates = nn.Linear(H, 2 * C)
        nn.init.orthogonal_(self.state_in.weight, gain=0.5)
        nn.init.orthogonal_(self.gates.weight, gain=0.7)
        # f goes from 0.27 to 0.98: some numbers of the state forget soon, others late
        self.gates.bias.data = torch.cat((torch.linspace(-1, 4, C), torch.zeros(C)))

    def forward(self, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, H or H * num_layers), s (B, C) -> the next state (B, C), the forget gate (B, C)."""
        first, *others = u.split(self.state_in.out_features, dim=-1)
        a = F.silu(first + self.state_in(s))                    # what the token and the state say
        for k, layer in enumerate(self.hidden):
            a = F.silu(layer(a) + (others[k] if others else 0))
        f, d = self.gates(a).chunk(2, dim=-1)
        f, d = torch.sigmoid(f), torch.tanh(d)                  # forget gate, candidate
        # f s + (1 - f) d, as in a GRU (Cho et al. 2014): an average, so |s| stays below 1, and a
        # wrong start fades. LayerNorm in here would blow it up again; it comes at the reading.
        return torch.lerp(d, s, f), f

def walk(cell: Cell, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token: u (B, T, ·), s (B, C) -> states (B, T, C), all forget gates' product."""
    states, kept = [], torch.ones_like(s)
    for u_t in u.unbind(1):
        s, f = cell(u_t, s)
        states.append(s)
        kept = kept * f
    return torch.stack(states, 1), kept

def context(s: Tensor) -> Tensor:
    """c = LayerNorm(s): what is read of states (..., C); zero mean and unit variance."""
    return F.layer_norm(s, s.shape[-1:])

def scan(f: Tensor, b: Tensor) -> Tensor:
    """y_t = f_t * y_{t-1} + b_t, y_0 = 0, of (B, T, C) in log2(T) steps (Hillis & Steele 1986)."""
    k = 1
    while k < f.shape[1]:
        b = torch.addcmul(b, f, F.pad(b, (0, 0, k, -k)))  # shifted by k to the right
        f = f * F.pad(f, (0, 0, k, -k), value=1)
        k *= 2
    return b

def chunked(x: Tensor) -> Tensor:
    """(B, T, D) -> (B * n, L, D): n chunks, the last filled up with zeros. Their length L is 16,
    or, on a CPU, about sqrt(T) / 2 if that is more; on a GPU every step is a launch."""
    _, T, D = x.shape
    L = 16 if x.is_cuda else 2 ** max(4, math.ceil(math.log2(T) / 2) - 1)
    return F.pad(x, (0, 0, 0, -T % L)).reshape(-1, L, D)

def solve(cell: Cell, u: Tensor, s0: Tensor, guess: Tensor | None = None) -> tuple:
    """The states that walk() gives: u (B, T, ·), s0 (B, C), guess (B, T, C), as of the last pass
    -> states (B, T, C), the chunks' starts (B, n, C), number of sweeps, 0 if it gave up and walked.

    Cut the text into n chunks and guess the state before each. A sweep walks all of them at once,
    as one batch of B * n rows. Where a chunk ends elsewhere than the next was guessed to start, the
    guesses are corrected together: start_{j+1} = end_j + kept_j * (correction of start_j), a linear
    recurrence, solved by scan(). Newton's method would take each chunk's full Jacobian for kept_j
    (Lim et al., DEER, ICLR 2024); here it is the product of the forget gates: a quasi-Newton method
    (Gonzalez et al., arXiv 2407.19115), which takes other steps to the same states."""
    (B, T, _), C, chunks = u.shape, s0.shape[1], chunked(u)
    n, L = len(chunks) // B, chunks.shape[1]
    starts, last = s0.new_zeros(B, n, C), slice(L - 1, (n - 1) * L, L)  # before the next chunk
    starts[:, 1:] = 0 if guess is None else guess[:, last]
    starts[:, 0] = s0
    for sweep in range(1, MAX_SWEEPS + 1):
        states, kept = walk(cell, chunks, starts.view(B * n, C))
        kept, ends = kept.view(B, n, C), states[:, -1].view(B, n, C)
        change = scan(kept[:, :-1], ends[:, :-1] - starts[:, 1:])
        starts[:, 1:] += change
        size = starts.std(-1, keepdim=True).clamp(min=1e-3)[:, 1:]  # what is read is LayerNorm(s)
        if n == 1 or (change / size).abs().max() <= TOLERANCE:
            return states.view(B, n * L, C)[:, :T], starts, sweep
    print(f"solver: {MAX_SWEEPS} sweeps did not reach {TOLERANCE}; walked token by token")
    states = walk(cell, u, s0)[0]
    starts[:, 1:] = states[:, last]
    return states, starts, 0

class ParallelStates(torch.autograd.Function):
    """solve() with its gradient: m_j = inside_j + J_j^T m_{j+1}, from the last chunk to the first.

    m_j is the gradient of the loss by the start of chunk j; inside_j is what comes of it from the
    chunk's own states; J_j is the Jacobian of the chunk's end by its start. Take two chunks. The
    second one's end leads nowhere: m_2 = inside_2. The first one's end is where the second starts,
    so m_2 arrives there, and autograd carries it to the first one's start: through_1 = J_1^T m_2.
    With n chunks all m_j are guessed. Were J_j the product of forget gates kept_j, one scan() would
    find them; so correct the guesses by that scan, let autograd carry them anew, and stop when they
    change by less than a thousandth. Then new = m, so that the terms with kept_j cancel: the
    gradient is true."""
    @staticmethod
    def forward(ctx, cell, u, s0, guess, *parameters):
        states, starts, sweeps = solve(cell, u, s0, guess)
        ctx.cell = cell
        ctx.save_for_backward(u, starts)
        return states, sweeps

    @staticmethod
    def backward(ctx, grad, _):
        u, starts = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        (B, n, C), learns = starts.shape, (u, starts, *ctx.cell.parameters())
        with torch.enable_grad():
            states, kept = walk(ctx.cell, chunked(u), starts.view(B * n, C))
        outside, kept = chunked(grad), kept.detach().view(B, n, C)
        inside = torch.autograd.grad(states, starts, outside, retain_graph=True)[0]
        m, change, ends = inside, math.inf, torch.zeros_like(outside)
        for _ in range(MAX_SWEEPS + 1):
            later = F.pad(m, (0, 0, -1, 1))  # m_{j+1}, which arrives at the end of chunk j
            ends[:, -1] = later.reshape(B * n, C)
            if change <= 1e-3 * m.norm():
                break
            through = torch.autograd.grad(states, starts, ends, retain_graph=True)[0]
            new = scan(kept.flip(1), (inside + through - kept * later).flip(1)).flip(1)
            change, m = (new - m).norm(), new
        else:  # it does not settle: backpropagation through time
            with torch.enable_grad():
                states, outside, ends = walk(ctx.cell, u, starts[:, 0])[0], grad, 0
        found = torch.autograd.grad(states, learns, outside + ends, allow_unused=True)
        return None, found[0], found[1][:, 0], None, *found[2:]

# --- 4. The model: the context block, the token block, the output head; how it writes -------------
class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, T, V)
    state: Tensor   # (B, C), after the last token

class NewLLM(nn.Module, PyTorchModelHubMixin):
    """Context block, token block, and an output head whose table is that of the embeddings. Learned
    embeddings must not change under frozen contexts: there the head goes on with a copy."""
    def __init__(self, config: Config, vocab_size: int = 50259):
        super().__init__()
        self._hub_mixin_config = asdict(config) | dict(vocab_size=vocab_size)  # its config.json
        E, C = config.embed_dim, config.context_dim
        self.config, self.sweeps = config, 0
        self.register_buffer("vocab", torch.arange(-3, vocab_size - 3))  # see Tokenizer
        self.embed, self.head = nn.Embedding(vocab_size, E), nn.Linear(E, vocab_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if config.joint or config.embeddings != "learned":
            self.head.weight = self.embed.weight
        self.embed.requires_grad_(config.embeddings == "learned")
        self.cell = Cell(config)
        self.out, self.dropout = nn.Linear(C, E), nn.Dropout(config.dropout)
        # g, 1 / temperature: sharp scores are soon known by heart, but overfit where text is new
        self.scale = nn.Parameter(torch.tensor(10.0 if config.patience else 25.0))

    def read(self, ids: Tensor) -> Tensor:
        """x: ids (...) -> (..., E), normalised; of an unknown word only zeros are read."""
        return F.layer_norm(self.embed(ids), self.embed.weight.shape[1:]) * (ids != UNK)[..., None]

    def states(self, ids: Tensor, state: Tensor | None = None, guess: Tensor | None = None,
               solver: str | None = None) -> Tensor:
        """Context block: ids (B, T), state (B, C) or None for zeros, guess as in solve(), solver or
        None for the config's (auto: the faster; up to SHORT tokens: walk) -> states (B, T, C)."""
        with torch.autocast(ids.device.type, enabled=False):
            u = self.cell.token_in(self.dropout(self.read(ids)))
            s = u.new_zeros(len(u), self.config.context_dim) if state is None else state.float()
            wanted = dict(parallel=True, sequential=False, auto=u.is_cuda or len(u) <= FEW)
            if wanted[solver or self.config.solver] and ids.shape[1] > SHORT:
                learns = self.cell.parameters()
                states, self.sweeps = ParallelStates.apply(self.cell, u, s, guess, *learns)
            else:
                states, self.sweeps = walk(self.cell, u, s)[0], 0
            return states

    def query(self, states: Tensor) -> Tensor:
        """Token block, q = W c + v: states (..., C) -> (..., E), with the direction that the next
        token's embedding should have."""
        return self.out(self.dropout(context(states)))

    def logits(self, states: Tensor, table: Tensor | None = None) -> Tensor:
        """Token block and output head: states (..., C) -> (..., V). The score of word w is
        g cos(q, e_w) + b_w, e_w being its row of the table (V, E); None: the head's."""
        q = self.scale * F.normalize(self.query(states).float(), dim=-1)
        table = F.normalize(self.head.weight if table is None else table, dim=-1)
        return F.linear(q, table, self.head.bias).float()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None,
                state: Tensor | None = None) -> Output:
        """ids (B, T) -> logits (B, T, V) and the state after the last token. state: where another
        call ended. labels (B, T), as Hugging Face has them (-100: ignored) -> the mean loss too."""
        states = self.states(input_ids, state)
        logits, loss = self.logits(states), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss, logits, states[:, -1])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens=100, eos_token_id: int | None = None,
                 state: Tensor | None = None, **sampling) -> Tensor:
        """ids (B, T) -> (B, T + new), arguments as in Hugging Face's generate(); sampling as in
        choose(), state as in forward(). Rows that have ended are filled up with eos_token_id."""
        ids, unread, eos = input_ids, input_ids, -1 if eos_token_id is None else eos_token_id
        ended = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        while ids.shape[1] < input_ids.shape[1] + max_new_tokens and not ended.all():
            state = self.states(unread, state)[:, -1]
            token = choose(self.logits(state), ids, **sampling)
            unread = token.masked_fill(ended, eos)[:, None]
            ids, ended = torch.cat((ids, unread), 1), unread[:, 0] == eos
        return ids

def choose(scores: Tensor, seen: Tensor, do_sample: bool = False, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0) -> Tensor:
    """The next token (B,) by logits (B, V) after the tokens seen (B, T); greedy by default."""
    seen = seen.masked_fill(seen == IM_END, UNK)  # answers could not end if it were punished
    said = scores.gather(1, seen)
    said = torch.where(said < 0, said * repetition_penalty, said / repetition_penalty)
    scores = scores.scatter(1, seen, said)
    scores[:, [UNK, IM_START]] = -math.inf  # nobody says these
    if not do_sample:
        return scores.argmax(-1)
    scores, token = (scores / max(temperature, 1e-5)).sort(descending=True)
    scores[:, top_k or scores.shape[1]:] = -math.inf
    p = scores.softmax(-1)  # next: the fewest tokens that add up to top_p (Holtzman et al. 2020)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0)
    return token.gather(1, torch.multinomial(p, 1))[:, 0]

def answer(model: NewLLM, text: str, max_new_tokens: int = 200, **sampling) -> str:
    """The model's answer to one message."""
    tokenizer = Tokenizer(model.vocab)
    question = model.vocab.new_tensor([tokenizer.question(text)])
    ids = model.eval().generate(question, max_new_tokens, IM_END, **sampling)
    return tokenizer.decode([i for i in ids[0, question.shape[1]:].tolist() if i != IM_END]).strip()

# --- 5. Training: one loop for both phases --------------------------------------------------------
TABLES, TABLE_RATE = ("embed.weight", "head.weight"), 0.2  # they learn slower, or they overfit
WARMUP, GAIN = 10, 1e-3  # steps in which the learning rate rises; what counts as a gain, in nats
PART = 8192  # tokens computed at a time on a CPU; on a GPU it is measured how many fit

class Phase:
    """What both phases share. loss() of a part of a batch returns what is to be minimised; the sums
    of words and of the figures `names`; the states. All chance in a step follows from its number,
    schedule.last_epoch: resumed, a run gives the same (not Phase 1 of several processes)."""
    def __init__(self, model: NewLLM, train: list[Dialogue], val: list[Dialogue]):
        self.model, self.train, self.val, self.config = model, train, val, model.config
        self.device, self.states = model.vocab.device, {}  # (T, C) of each dialogue, if they fit
        self.caches = 4 * count(train)[0] * self.config.context_dim <= 1e9 * self.config.cache_gb
        rate = self.rate * self.config.learning_rate
        self.optimizer = torch.optim.AdamW([
            dict(params=[p], lr=rate * (TABLE_RATE if name in TABLES else 1))
            for name, p in model.named_parameters() if p.requires_grad], fused=True)
        self.learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        steps = self.epochs * len(batches_of(train, self.config.batch_tokens))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(
            1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2)
        cuda, dtype = self.device.type == "cuda", self.config.dtype
        self.parts = 0 if cuda else math.ceil(self.config.batch_tokens / PART)  # 0: to be measured
        can = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = dtype == "bfloat16" or dtype == "auto" and can

    def fit(self, key: int = 0):
        """Train until the epochs are over, or `patience` in a row have gained nothing; where there
        is patience, the best weights are taken. Goes on from a last checkpoint of the same settings
        and `key` (data, cell, first weights); Phase 2 with --resume only. Returns self."""
        best, last = (Path(self.config.out, f"{self.name}-{kind}.pt") for kind in ("best", "last"))
        epoch, lowest, waited = 0, math.inf, 0
        if last.exists() and (self.config.resume or self.name == "phase1"):
            with contextlib.suppress(() if self.config.resume else UserError):
                epoch, lowest, waited = self.resume(last, key)
        start, first, writer = time.perf_counter(), epoch, None
        if self.config.tensorboard and RANK == 0:
            with explained("--tensorboard", "pip install tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(self.config.tensorboard)
        while epoch < self.epochs and not 0 < self.patience <= waited:  # patience 0: to the end
            figures = self.run(self.train, learn=True)
            if self.val:
                figures |= {f"held-out {k}": v for k, v in self.run(self.val).items()
                            if k in ("loss", "right", "perplexity")}
            goal = figures.get("held-out loss", figures["loss"])
            gained = goal < lowest - GAIN
            epoch, (lowest, waited) = epoch + 1, (goal, 0) if gained else (lowest, waited + 1)
            to_chat = dict(config=asdict(self.config), model=self.model.state_dict(), key=key,
                           phase=self.name, progress=(epoch, lowest, waited), figures=figures)
            to_go_on = dict(states=self.states, optimizer=self.optimizer.state_dict(),
                            schedule=self.schedule.state_dict(), parts=self.parts)
            for path, content in ((best, to_chat), (last, to_chat | to_go_on)):
                if RANK == 0 and (gained or path == last):
                    save(path, lambda file: torch.save(content, file))
            self.config.resume = False  # a later phase's checkpoint would be of another run
            left = (time.perf_counter() - start) / (epoch - first) * (self.epochs - epoch)
            shown = [f"{epoch:5d} of {self.epochs}", *(f"{k} {v:.4g}" for k, v in figures.items())]
            print(" | ".join([*shown, f"{left:.0f} s left"]), flush=True)
            for k, v in figures.items() if writer else ():
                writer.add_scalar(f"{self.name}/{k}", v, epoch)
        if epoch < self.epochs:
            print(f"  no gain in {waited} passes: the best is kept")
        if WORLD > 1:
            dist.barrier()  # until the best is written
        if self.patience:
            with explained(f"cannot use {best}", "delete what is there, or take another --out"):
                self.model.load_state_dict(torch.load(best, "cpu", weights_only=True)["model"])
        return self

    def resume(self, last: Path, key: int) -> tuple[int, float, int]:
        """Take over the last checkpoint and return its progress, or UserError: it is not ours."""
        old, new = read_checkpoint(last)[1], asdict(self.config)
        names = [f.name for f in fields(Config) if f.metadata["group"] in self.groups]
        other = [f"{flag(k)} {old['config'][k]}, not {new[k]}" for k in names
                 if old["config"][k] != new[k]]
        other += ["other data or another cell"] * (old["key"] != key)
        if other:
            raise UserError(f"--resume: {last} has {other[0]}; undo that, or "
                            "leave out --resume (a finished Phase 1 is kept)")
        for part in ("model", "optimizer", "schedule"):
            getattr(self, part).load_state_dict(old[part])
        self.states, self.parts = old["states"] if self.caches else {}, old["parts"]
        print(f"  going on after pass {old['progress'][0]}, found in {last}")
        return old["progress"]

    def run(self, dialogues: list[Dialogue], learn: bool = False) -> dict[str, float]:
        """One pass over dialogues, to learn from them or only to see. Returns its figures."""
        batches = batches_of(dialogues, self.config.batch_tokens)
        order = random.Random(self.config.seed + self.schedule.last_epoch // len(batches))
        bar = tqdm(order.sample(batches, len(batches)), disable=RANK > 0 or None, leave=False)
        self.model.train(learn)
        with torch.set_grad_enabled(learn):
            sums = sum(self.step(dialogues, batch) for batch in bar)
        figures = dict(zip(self.names, (sums[1:] / sums[0]).tolist()))
        if "right" in figures:
            figures["perplexity"] = math.exp(min(figures["loss"], 99))
        return figures

    def step(self, dialogues: list[Dialogue], batch: list[int]) -> Tensor:
        """A batch of dialogues and, to learn, an optimizer step. Returns the sums that loss() does.
        A process computes its share in parts that fit into memory. On a GPU the first step has up
        to eight, and their peak says how many later ones need; out of memory, twice as many."""
        mine, found = batch[RANK::WORLD], None
        if not self.parts:
            torch.cuda.reset_peak_memory_stats()
        while found is None:
            n = min(self.parts or 8, len(mine))
            try:
                self.optimizer.zero_grad()
                found = [self.compute(dialogues, mine[k::n]) for k in range(n)]
            except torch.OutOfMemoryError:
                if n >= len(mine):
                    raise UserError("not even one dialogue fits into memory; lower --max-len or "
                                    "--hidden-dim") from None
                self.parts = 2 * n
                print(f"memory: too little; a step is computed in {2 * n} parts")
        if not self.parts:
            used, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - used
            self.parts = max(1, math.ceil(n * (peak - used) / (0.8 * free)))
            print(f"memory: {n * (peak - used) / 1e9:.2f} GB a step, {free / 1e9:.2f} free: "
                  f"{self.parts} part(s)")
        for _, new in found:
            self.states |= new
        sums = sum((part for part, _ in found), torch.zeros(len(self.names) + 1).to(self.device))
        if WORLD > 1:
            dist.all_reduce(sums)
        if not sums.isfinite().all():
            raise UserError(f"the loss is {sums[1]}; train anew with a lower --learning-rate; the "
                            f"last good checkpoint is in {self.config.out}")
        if self.model.training:
            for p in self.learning:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if WORLD > 1:
                    dist.all_reduce(p.grad)
                p.grad /= sums[0].clamp(min=1)
            nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.schedule.step()
        return sums.cpu()

    def compute(self, dialogues: list[Dialogue], part: list[int]) -> tuple[Tensor, dict]:
        """Some dialogues' sums and new states; to learn, their gradients are added up."""
        learn = self.model.training
        torch.manual_seed(self.config.seed + self.schedule.last_epoch)  # for dropout
        ids, mask = (pad(x, self.device) for x in zip(*(dialogues[i] for i in part)))
        held = [self.states[i] for i in part if learn and i in self.states]
        before = pad(held, self.device) if len(held) == len(part) else None
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            loss, sums, states = self.loss(part, ids, mask, before)
        if learn:
            loss.backward()
        new = states.detach().cpu() if learn and self.caches and states is not before else ()
        return torch.stack(sums).detach(), {i: s[:len(dialogues[i].ids)] for i, s in zip(part, new)}

def batches_of(dialogues: list[Dialogue], tokens: int) -> list[list[int]]:
    """Indices of dialogues of like length, at most `tokens` together with padding, or one."""
    batches = []
    for i in sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].ids)):
        if not batches or (len(batches[-1]) + 1) * len(dialogues[i].ids) > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches

def pad(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Tensors (T, ...) as one (B, T, ...), filled up with zeros: UNK, and no target."""
    return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True).to(device)

# --- 6. Phase 1: learn the contexts of all tokens at once, the user's too -------------------------
DIVERSITY, CONVERGED = 0.9, 0.01  # w; mean squared change of a context that is settled

class Phase1(Phase):
    """Contexts that settle and differ: loss = (1 - w) CVFP + w diversity, w being DIVERSITY. CVFP,
    context vector fixed point, is the mean squared change of a context since the last pass.
    Diversity is the cross entropy of the next word, the user's too, by the token block's score:
    contexts that have to tell words apart spread out (uniformity: Wang & Isola 2020)."""
    name, names, groups = "phase1", ("loss", "change", "converged"), ("model", "Phase 1")

    def __init__(self, model: NewLLM, train: list[Dialogue], val: list[Dialogue]):
        self.epochs, self.patience, self.rate = model.config.iterations, 2, 1.0
        super().__init__(model, train, val)
        print("\nPhase 1: loss, nats per word, the user's too; change, of contexts in a pass;\n"
              f"converged, share of them below {CONVERGED}", flush=True)

    def loss(self, part, ids: Tensor, mask: Tensor, before: Tensor | None) -> tuple:
        """ids, mask (B, T), their states in the last pass (B, T, C) or None -> what is to be
        minimised; sums of words, loss, change, converged; states (B, T, C)."""
        states, at = self.model.states(ids, guess=before), ids[:, 1:] != UNK
        z = self.model.logits(states[:, :-1][at], self.model.embed.weight)
        loss = F.cross_entropy(z, ids[:, 1:][at], reduction="sum")
        old = 0 if before is None else context(before)
        change = (context(states) - old)[:, 1:][at].pow(2).mean(-1)  # 1 where no pass came before
        sums = (at.sum(), loss, change.sum(), (change < CONVERGED).sum())
        return (1 - DIVERSITY) * change.sum() + DIVERSITY * loss, sums, states

    @torch.no_grad()
    def report(self):
        """Say whether Phase 2's contexts are those of a chat, and warn of two ways to fail."""
        ids = torch.cat([d.ids for d in self.train])[None, :4096].to(self.device)  # as one text
        s, found = (self.model.eval().states(ids, solver=solver)[0]
                    for solver in ("sequential", "parallel"))  # the latter's sweeps are shown
        c, same = context(found), F.cosine_similarity(s[1:], s[:-1]).mean()
        far, alike = (c - context(s)).pow(2).mean(), F.normalize(c, dim=-1).mean(0).pow(2).sum()
        print(f"contexts are {far:.0e} from the token loop's, mean square (2 is unrelated), found "
              f"in {self.model.sweeps} sweeps; they use {effective_rank(c):.0%} of their "
              f"dimensions\ncosine of two {alike:.2f}, of a state and the next {same:.2f}")
        if same > 0.99:
            print("warning: identity mapping, the state hardly changes; give more --samples")
        if alike > 0.95:
            print("warning: global attractor, all contexts are alike; raise --context-dim")

def effective_rank(c: Tensor) -> float:
    """exp(entropy of normalised singular values) / C of (N, C) (Roy & Vetterli 2007)."""
    p = F.normalize(torch.linalg.svdvals(c - c.mean(0)), p=1, dim=0)
    return torch.special.entr(p).sum().exp().item() / c.shape[1]

# --- 7. Phase 2: learn to predict the assistant's words -------------------------------------------
HOLES, GENTLE = 0.1, 0.15  # for new text: share of tokens hidden; of the learning rate

class Phase2(Phase):
    """Cross entropy of the assistant's words, by the token block that Phase 1 has begun. For new
    text it goes on gently, and the frozen context block reads the dialogues anew in every pass,
    with dropout and a share HOLES of the tokens hidden: contexts of a text known by heart would be
    trusted more than a chat's deserve; validation has neither. By heart, contexts are kept."""
    name, names, groups = "phase2", ("loss", "right"), ("model", "Phase 1", "Phase 2")

    def __init__(self, model: NewLLM, train: list[Dialogue], val: list[Dialogue]):
        config, joint = model.config, model.config.joint
        self.epochs, self.patience = config.epochs, config.patience
        self.rate = GENTLE if config.iterations and config.patience and not joint else 1.0
        model.cell.requires_grad_(joint)
        model.embed.requires_grad_(joint and config.embeddings == "learned")
        super().__init__(model, train, val)
        self.caches &= not (joint or config.patience or config.dropout)
        how = "both blocks learn" if joint else "the context block is frozen"
        print(f"\nPhase 2: {how}; loss, nats per word of the assistant;\n"
              "right, share of the words that it would say; perplexity, e^loss", flush=True)

    def with_holes(self, i: int) -> Tensor:
        """What the context block reads of a dialogue, (T,), in this pass. Holes follow from step
        and dialogue alone, so that neither parts nor processes change them."""
        place, ids = self.schedule.last_epoch * len(self.train) + i, self.train[i].ids
        generator = torch.Generator().manual_seed(self.config.seed + place)
        return ids.masked_fill(torch.rand(len(ids), generator=generator) < HOLES, UNK)

    def loss(self, part: list[int], ids: Tensor, mask: Tensor, states: Tensor | None) -> tuple:
        """ids, mask (B, T), their states (B, T, C) or None -> what is to be minimised; sums of
        words, of loss, of words that were right; states (B, T, C)."""
        if states is None:
            holes = self.model.training and self.config.patience
            shown = pad(map(self.with_holes, part), self.device) if holes else ids
            states = self.model.states(shown)
        at = mask[:, 1:]
        z, y = self.model.logits(states[:, :-1][at]), ids[:, 1:][at]
        loss, right = F.cross_entropy(z, y, reduction="sum"), (z.argmax(-1) == y).sum()
        return loss, (at.sum(), loss, right), states

# --- 8. Helpers that a first reading may skip: processes, files, devices; and main() --------------
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

@contextlib.contextmanager
def explained(what: str, way_out: str):
    """Whatever goes wrong in here becomes a UserError: what cannot be done, cause and way out."""
    try:
        yield
    except Exception as e:  # networks, damaged files and full disks raise anything
        cause = f"{type(e).__name__}: {str(e).strip()}".splitlines()[0][:150]
        raise UserError(f"{what} ({cause}); {way_out}") from None

def save(path: Path, write: Callable):
    """Let write() make a file, whole or not at all. Raises UserError."""
    with explained(f"cannot write {path}", "free space, or name another folder: --out or --cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            write(Path(folder, path.name))
            os.replace(Path(folder, path.name), path)

def read_checkpoint(path: Path) -> tuple[NewLLM, dict]:
    """The model that fit() saved, and all the rest; no code in it is run. Raises UserError."""
    with explained(f"cannot use {path}", "if it is damaged or too old, name another folder"):
        checkpoint = torch.load(path, "cpu", weights_only=True)
        model = NewLLM(Config(**checkpoint["config"]), len(checkpoint["model"]["vocab"]))
        model.load_state_dict(checkpoint["model"])
    return model, checkpoint

def pick_device(name: str) -> torch.device:
    """cuda > mps > cpu, or what the user says. Raises UserError for a device that is not there."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    with explained(f"--device {name} is not there", f"this machine has {found}"):
        return torch.zeros(1, device=found if name == "auto" else name).device

def gpt2_table(name: str, cache: str) -> Tensor:
    """GPT-2's embeddings (50257, 768), wte.weight of a .safetensors file, or of the hub's, of which
    only these 154 of 548 MB are read, once. Raises UserError."""
    path = Path(cache, "gpt2-wte.safetensors") if name == "gpt2" else Path(name)
    with explained(f"--embeddings {name} cannot be had", "go online, or give a file, or learned"):
        from safetensors.torch import load_file, save_file
        if name == "gpt2" and not path.exists():
            HfApi().model_info("openai-community/gpt2", timeout=5)  # fails at once without network
            with HfFileSystem().open("openai-community/gpt2/model.safetensors") as file:
                size = int.from_bytes(file.read(8), "little")
                begin, end = json.loads(file.read(size))["wte.weight"]["data_offsets"]
                file.seek(8 + size + begin)
                data = torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.float32)
            save(path, lambda file: save_file({"wte.weight": data.view(50257, 768)}, file))
        tables = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        if (shape := tuple(tables["wte.weight"].shape)) != (50257, 768):
            raise ValueError(f"wte.weight is {shape}, not (50257, 768)")
    return tables["wte.weight"].float()

def make_model(config: Config, vocab: Tensor) -> NewLLM:
    """A fresh model with the embeddings that --embeddings asks for, or UserError."""
    if config.embeddings == "auto":
        try:
            return make_model(replace(config, embeddings="gpt2"), vocab)
        except UserError as e:
            print(f"embeddings: {e}; learned instead")
            return make_model(replace(config, embeddings="learned"), vocab)
    torch.manual_seed(config.seed)
    if config.embeddings == "learned":
        model, tokenizer = NewLLM(config, len(vocab)), Tokenizer(vocab)
        table = model.embed.weight.data  # `Hello` and ` hello` start alike, cosines of 0.6 to 0.8
        alike = [tokenizer.alike[tokenizer.bare(pair)] for pair in vocab[3:].tolist()]
        table.copy_(0.8 * table[[0, 1, 2, *alike]] + 0.6 * table)
    else:
        table = gpt2_table(config.embeddings, config.cache)
        model = NewLLM(replace(config, embed_dim=table.shape[1]), len(vocab))
        model.embed.weight.data.normal_(std=table.std().item())  # for <unk> and ChatML's two
        model.embed.weight.data[3:] = table[vocab[3:]]
    model.vocab.copy_(vocab)
    return model.eval()

def show_data(dialogues: list[Dialogue], tokenizer: Tokenizer):
    """Print dialogues as the model sees them, targets in [brackets]."""
    for number, d in enumerate(dialogues, 1):
        print(f"\n--- dialogue {number}: {len(d.ids)} tokens, {count([d])[1]} of them targets")
        for target, part in itertools.groupby(zip(*map(Tensor.tolist, d)), lambda pair: pair[1]):
            text = tokenizer.decode([i for i, _ in part])
            print(f"[{text}]" if target else text, end="")

def train_model(config: Config) -> NewLLM | None:
    """Both phases. Returns the model to chat with."""
    if config.resume and not any(Path(config.out).glob("phase?-last.pt")):
        raise UserError(f"--resume: no checkpoint in {config.out}; train first, or name its --out")
    if WORLD > 1:  # started by torchrun
        gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # the first one speaks for all
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus >= local else "gloo")
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    train, val, vocab = load(config)
    if config.show_data:
        return show_data(train[:config.show_data], Tokenizer(vocab))
    for folder in (config.out, config.cache):  # better to learn it now than after an hour
        save(trial := Path(folder, ".writable"), Path.touch)
        trial.unlink(missing_ok=True)
    model = make_model(config, vocab).to(device)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    probe = model.states(train[0].ids[None].to(device)).mean().item()  # differs if the cell does
    texts = [tuple(ids.tolist()) for ids in (vocab, *(d.ids for d in train + val))]
    key = hash((len(train), round(probe, 5), *texts))
    if config.iterations:
        Phase1(model, train, val).fit(key).report()
    model.head.weight.data.copy_(model.embed.weight)  # from here on it learns apart, see NewLLM
    Phase2(model, train, val).fit(key)
    return model.eval()

def main(argv: list[str] | None = None) -> NewLLM | None:
    """Train as the options say. Returns the model. In a notebook sys.argv is not ours: ignored."""
    start, notebook = time.perf_counter(), hasattr(builtins, "__IPYTHON__")
    torch.set_flush_denormal(True)  # numbers near 1e-40 make exp ten times slower
    try:
        config = parse(argv if argv is not None else [] if notebook else sys.argv[1:])
        model = train_model(config)
        if model:
            print(f"\ndone in {time.perf_counter() - start:.0f} s\n\nYou: who are you?\nNew-LLM: "
                  f"{answer(model, 'who are you?')}\n\n"
                  f"chat with it: python chat.py --checkpoint {config.out}")
        return model
    except UserError as e:
        if notebook:
            raise
        print(f"newllm.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; finished passes are saved: repeat the command with --resume")

if __name__ == "__main__":
    main()
