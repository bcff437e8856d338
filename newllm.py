"""New-LLM: a language model without attention, in one file that reads from top to bottom.

The model reads token by token. All it remembers is one vector of fixed size, the state: each token
updates it, and the next word is predicted from both. Phase 1 trains the context block, with the
help of the token block, to update the state. Phase 2 trains the token block alone, to speak.

    python newllm.py --small            learn ten dialogues by heart, in seconds
    python newllm.py --data mine.jsonl  learn your own dialogues by heart
    python newllm.py --large            learn from UltraChat to answer new questions
    python chat.py                      chat with the trained model

Letters used throughout:
    B, T, V  dialogues in a batch, tokens in a dialogue, tokens in the vocabulary
    E, C, H  embed_dim, context_dim, hidden_dim
    x        embedded tokens (B, T, E)
    u        what they add to hidden layers (B, T, H) or (B, T, H * num_layers)
    s        the state after a token (B, C), after each (B, T, C)
    c        the context, LayerNorm(s)
"""
import argparse, contextlib, itertools, json, math, os, random, sys, time, unicodedata, zlib
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tiktoken, torch
import huggingface_hub as hub
import torch.nn.functional as F
from torch import Tensor, distributed as dist, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# --- 1. Configuration: each field is also an option ---
HERE = Path(__file__).parent if "__file__" in globals() else Path()  # a notebook has no file
SHIPPED = str(HERE / "data/chats.jsonl") if (HERE / "data/chats.jsonl").exists() else "ultrachat"

class UserError(ValueError):
    """What the user can fix: printed in one line, no traceback."""
def flag(name):
    return "--" + name.replace("_", "-")
def option(default, help, least=None, most=2 ** 31, choices=""):
    limits = None if least is None else (least, most)
    return field(default=default, metadata=dict(help=help, limits=limits, choices=choices.split()))

@dataclass
class Config:
    data: str = option(SHIPPED, ".jsonl or .txt file, ultrachat, or a dataset on the hub")
    val_data: str = option("", "validate on this; as --data")
    samples: int = option(0, "dialogues to read; 0 for all", least=0)
    max_len: int = option(512, "cut dialogues after this many tokens", least=2)
    hold_out: bool = option(False, "learn for new text, validate on every tenth dialogue")
    embeddings: str = option("learned", "auto: gpt2's, if there", choices="learned gpt2 auto")
    embed_dim: int = option(256, "E, size of learned embeddings", least=2)
    num_layers: int = option(1, "hidden layers of the context block", least=1)
    context_dim: int = option(128, "C, size of the state", least=2)
    hidden_dim: int = option(256, "H, width of a hidden layer", least=1)
    token_input_all_layers: bool = option(False, "feed the token to every hidden layer")
    dropout: float = option(0.0, "share of both blocks' inputs to drop", least=0, most=0.95)
    solver: str = option("auto", "auto: the faster one", choices="auto parallel sequential")
    iterations: int = option(40, "passes of Phase 1 at most; 0 skips it", least=0)
    epochs: int = option(10, "passes of Phase 2", least=1)
    learning_rate: float = option(3e-3, "highest learning rate", least=1e-9)
    batch_tokens: int = option(64, "tokens per optimizer step", least=1)
    joint: bool = option(False, "let Phase 2 train the context block too")
    seed: int = option(42, "seed of all random numbers", least=0)
    device: str = option("auto", "cuda, mps, cpu; auto takes the fastest")
    out: str = option("checkpoints", "folder for checkpoints")
    cache: str = option("cache", "folder for datasets")
    resume: bool = option(False, "go on with the run in --out")
    def __post_init__(self):
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata.get("limits")
            if limits and not limits[0] <= value <= limits[1]:  # nan fails, too
                raise UserError(f"{flag(f.name)} {value}: give {limits[0]} to {limits[1]}")

PRESETS = {  # what it is for, what it changes
    "small": ("ten dialogues by heart, in seconds (the default)", dict(samples=10)),
    "medium": ("100 dialogues of UltraChat by heart (the default for a file)", dict(
        data="ultrachat", samples=100, embeddings="auto", num_layers=2, context_dim=256,
        hidden_dim=512, iterations=11, epochs=4, learning_rate=2e-3, batch_tokens=1024)),
    "large": ("1,000 dialogues of UltraChat, to answer new questions", dict(
        data="ultrachat", samples=1000, max_len=1024, hold_out=True, embeddings="auto",
        num_layers=4, context_dim=512, hidden_dim=1024, dropout=0.5, iterations=24, epochs=6,
        learning_rate=2e-3, batch_tokens=2048))}

# --- 2. Data: dialogues become token ids, and a mask of what to learn ---
UNK, IM_START, IM_END = 0, 1, 2  # our ids; tiktoken's numbers for them:
SPECIAL = {"<unk>": 50256, "<|im_start|>": 50257, "<|im_end|>": 50258}
EVERY = [*SPECIAL.values(), *range(50256)]  # the number of an id

@dataclass
class Dialogue:
    ids: Tensor   # (T,) int64
    mask: Tensor  # (T,) bool, True on words to learn: the assistant's, and their <|im_end|>
    states: Tensor | None = None  # (T, C), as the last pass made them

class Tokenizer:
    """Text to GPT-2's tokens and back. What is not in vocab becomes <unk>."""
    def __init__(self, vocab=EVERY):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(HERE / "data"))
        with explained("no tokenizer", "go online once, or start where data/ is"):
            gpt2 = tiktoken.get_encoding("r50k_base")
        self.gpt2 = tiktoken.Encoding("chatml", pat_str=gpt2._pat_str, special_tokens=SPECIAL,
                                      mergeable_ranks=gpt2._mergeable_ranks)
        self.vocab, self.id_of = vocab, {number: i for i, number in enumerate(vocab)}
    def encode(self, text):  # a typed <|im_end|> becomes ordinary tokens
        return [self.id_of.get(number, UNK) for number in self.gpt2.encode_ordinary(text)]
    def decode(self, ids) -> str:
        return self.gpt2.decode([self.vocab[i] for i in ids])
    def dialogue(self, messages) -> Dialogue:
        """ChatML: <|im_start|>role, new line, text, <|im_end|>, new line, for each message."""
        ids, mask = [], []
        for message in messages:
            role, text = message["role"], message["content"]
            if isinstance(text, list):  # parts, some of which are text
                text = "".join(part.get("text", "") for part in text)
            if role not in ("system", "user", "assistant") or not isinstance(text, str):
                raise ValueError(f"message with role {role!r:.40} and content {text!r:.40}")
            head = [IM_START, *self.encode(role + "\n")]
            body = [*self.encode(normalised(text) if role == "user" else text), IM_END]
            ids += head + body + self.encode("\n")
            mask += [False] * len(head) + [role == "assistant"] * len(body) + [False]
        return Dialogue(torch.LongTensor(ids), torch.BoolTensor(mask))
    def question(self, text) -> list[int]:
        messages = [dict(role="user", content=text), dict(role="assistant", content="")]
        return self.dialogue(messages).ids.tolist()[:-2]

def normalised(text):
    """A user's text as it is read. The space makes the first word like others."""
    return " " + unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower().strip()
def is_text(name):
    return Path(name).suffix.lower() in (".txt", ".text", ".md")
def is_file(name):
    return is_text(name) or Path(name).suffix.lower() in (".jsonl", ".json") or Path(name).is_file()

def read(name, split, samples, config) -> list[Dialogue]:
    """The first `samples` dialogues of a file or a dataset, 0 for all."""
    path = Path(name) if is_file(name) else download(name, split, samples, config.cache)
    with explained(f"cannot read {path}", "give a .jsonl or .txt file in UTF-8"):
        text = path.read_text("utf-8-sig")
    tokenizer, dialogues = Tokenizer(), []
    if is_text(name):  # all of it is to be learned; ten pieces, if one is held out
        ids = torch.LongTensor(tokenizer.encode(text))
        tenth = math.ceil(len(ids) / 10) if config.hold_out else config.max_len
        pieces = ids.split(max(2, min(config.max_len, tenth)))
        return [Dialogue(piece, torch.ones_like(piece).bool()) for piece in pieces]
    for k, line in enumerate(text.split("\n"), 1):
        if line.strip() and (not samples or len(dialogues) < samples):
            with explained(f"{path} line {k} is no dialogue", "see README.md"):
                dialogues.append(tokenizer.dialogue(json.loads(line)["messages"]))
    return dialogues

def download(name, split, samples, cache) -> Path:
    """The first dialogues of a dataset of the hub, as a cached file."""
    if name == "ultrachat":
        name, split = "HuggingFaceH4/ultrachat_200k", f"{split}_sft"
    path = Path(cache, f"{name.replace('/', '--')}-{split}-{samples or 'all'}.jsonl")
    if not path.exists():
        with explained(f"cannot read dataset {name}", "offline, take --data data/chats.jsonl"):
            hub.HfApi().dataset_info(name)  # offline it fails at once
            from datasets import load_dataset
            stream = load_dataset(name, split=split, streaming=True)
            lines = [json.dumps(dict(messages=record["messages"])) + "\n"
                     for record in tqdm(itertools.islice(stream, samples or None))]
        write(path, lambda file: file.write_text("".join(lines), "utf-8"))
    return path

def load(config) -> tuple[list[Dialogue], list[Dialogue], list[int]]:
    """Dialogues to train on, dialogues to validate on, vocabulary."""
    train, val, size = read(config.data, "train", config.samples, config), [], config.max_len
    if config.val_data:
        val = read(config.val_data, "test", math.ceil(config.samples / 10), config)
    elif config.hold_out:
        val = train[9::10] or train[-1:]
    held_out = {tuple(d.ids[:size].tolist()) for d in val}
    train = [d for d in train if tuple(d.ids[:size].tolist()) not in held_out]
    used = sorted({UNK, IM_START, IM_END}.union(*(d.ids[:size].tolist() for d in train)))
    new_id = torch.zeros(len(EVERY)).long()  # UNK for what is not used
    new_id[used] = torch.arange(len(used))
    total, cut = len(train + val), sum(len(d.ids) > size for d in train + val)
    for d in train + val:
        d.ids = new_id[d.ids[:size]]
        d.mask = d.mask[:size] & (d.ids != UNK)
    train, val = ([d for d in part if d.mask[1:].any()] for part in (train, val))
    tokens = sum(len(d.ids) for d in train)
    print(f"data: {len(train)} dialogues, {tokens:,} tokens, V={len(used)}; {len(val)} held out; "
          f"{cut} cut, {total - len(train + val)} without an answer left out")
    if not train or not val and (config.val_data or config.hold_out):
        raise UserError(f"{config.data}: too few answers; see --samples, --max-len, --val-data")
    return train, val, [EVERY[i] for i in used]

# --- 3. Contexts: token by token, or all at once ---
class Cell(nn.Module):
    """The context block. One step of the recurrence: (u_t, s_{t-1}) -> s_t."""
    def __init__(self, config):
        super().__init__()
        E, C, H = config.embed_dim, config.context_dim, config.hidden_dim
        readers = config.num_layers if config.token_input_all_layers else 1
        self.token_in = nn.Linear(E, H * readers)
        self.state_in = nn.Linear(C, H, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(H, H) for _ in range(config.num_layers - 1))
        self.gates = nn.Linear(H, 2 * C)
        nn.init.orthogonal_(self.state_in.weight, gain=0.5)
        nn.init.orthogonal_(self.gates.weight, gain=0.7)
        # f, the share to keep, starts at 0.27 to 0.98; by heart up to 0.9997, to remember names.
        longest = 4 if config.hold_out else 8
        self.gates.bias.data = torch.cat((torch.linspace(-1, longest, C), torch.zeros(C)))
    def forward(self, u, s):
        """u (B, H or H * num_layers), s (B, C) -> next state and forget gate, both (B, C)."""
        first, *others = u.split(self.state_in.out_features, dim=-1)
        a = F.silu(torch.addmm(first, s, self.state_in.weight.t()))
        for k, layer in enumerate(self.hidden):  # residual, or depth would not learn
            a = a + F.silu(layer(a) + others[k] if others else layer(a))
        f, d = torch.sigmoid(self.gates(a)).chunk(2, dim=-1)
        d = 2 * d - 1  # tanh(z / 2), but faster than torch.tanh on a CPU
        return torch.lerp(d, s, f), f  # f * s + (1 - f) * d, as in a GRU: |s| stays below 1

def walk(cell, u, s):
    """Token by token: u (B, T, ...), s (B, C) -> states (B, T, C), product of all f (B, C)."""
    states, kept = [], torch.ones_like(s)
    for u_t in u.unbind(1):
        s, f = cell(u_t, s)
        states.append(s)
        kept = kept * f.detach()
    return torch.stack(states, 1), kept

def context(s):
    """c = LayerNorm(s): states (..., C) as the rest of the model sees them."""
    return F.layer_norm(s, s.shape[-1:])

def scan(f, b):
    """y_t = f_t * y_{t-1} + b_t, y_0 = 0, of (B, T, C) in log2(T) steps (Hillis & Steele 1986)."""
    k = 1
    while k < f.shape[1]:  # b_t: the last k steps, begun at 0
        b = torch.addcmul(b, f, F.pad(b, (0, 0, k, -k)))
        f = f * F.pad(f, (0, 0, k, -k), value=1)
        k *= 2
    return b

# The solver. 4,096 tokens are 128 chunks of 32. If the state before each were known, all could be
# walked side by side, in 32 steps. So guess these starts, walk, and compare: chunk j ends in one
# state, chunk j + 1 was guessed to start from another. As s_t = f * s_{t-1} + ..., moving a start
# by m moves the end of its chunk by about kept * m (kept: the product of f), and so on: a linear
# recurrence, which scan() adds up for all starts. After some sweeps each chunk starts where the one
# before it ends. (Parareal, Lions et al. 2001; quasi-Newton: DEER, Lim et al. 2024.)
TOLERANCE = 5e-5  # starts have settled when a sweep moves them by less, relative to their spread
RECORDED = 3      # sweeps to record at least: all from an error of 0.05 on
MAX_SWEEPS = 30   # after so many, the tokens are walked

def sweep(cell, chunks, s0, starts):
    """n chunks (B * n, L, ...), the state before the first (B, C), guesses of those before others
    (B, n - 1, C) -> states (B * n, L, C), by how much to change the guesses (B, n - 1, C)."""
    before = torch.cat((s0[:, None], starts), 1)  # (B, n, C)
    states, kept = walk(cell, chunks, before.flatten(0, 1))  # (B * n, L, C), (B * n, C)
    ends = states[:, -1].view_as(before)[:, :-1]  # (B, n - 1, C)
    return states, scan(kept.view_as(before)[:, :-1], ends - starts)

def extrapolate(old, new):
    """Pairs of (guesses, the change that led there), each (B, n - 1, C). If a sweep leaves a share
    r of an error, r / (1 - r) of the last move is yet to come, here gamma (Anderson 1965)."""
    diff = old[1] - new[1]
    gamma = (diff * new[1]).sum((1, 2), True) / diff.square().sum((1, 2), True).clamp(1e-30)
    return new[0] + gamma.detach() * (new[0] - old[0])

def solve(cell, u, s0):
    """u (B, T, ...), s0 (B, C) -> walk()'s states (B, T, C); number of sweeps, 0 if it walked.
    Autograd sees the last sweeps only: each shrinks the gradient's error like the states'."""
    (B, T, D), C = u.shape, s0.shape[1]
    L = 16 if u.is_cuda else max(16, math.isqrt(T) // 2)  # GPU time goes by steps
    chunks = F.pad(u, (0, 0, 0, -T % L)).reshape(-1, L, D)  # (B * n, L, D)
    n = len(chunks) // B
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in (u, s0, *cell.parameters()))
    sweeps, recorded = 0, 0 if learns else RECORDED
    starts, error, last = s0.new_zeros(B, n - 1, C), math.inf, None
    while n > 1 and sweeps < MAX_SWEEPS and (error > TOLERANCE or recorded < RECORDED):
        records = learns and (recorded > 0 or error < 0.05)
        with torch.set_grad_enabled(records):
            states, change = sweep(cell, chunks, s0, starts)
            size = starts.std(-1, keepdim=True).clamp(min=1e-3)
            error = (change / size).abs().max().item()
            old, last = last, (starts + change, change)
            starts = extrapolate(old, last) if old else last[0]
        sweeps, recorded = sweeps + 1, recorded + records
    if error <= TOLERANCE:
        return states.view(B, n * L, C)[:, :T], sweeps
    if sweeps:
        print(f"solver: not settled after {sweeps} sweeps; walks")
    return walk(cell, u, s0)[0], 0

# --- 4. The model: context block, token block, head; how it writes ---
Output = namedtuple("Output", "loss logits state")  # a number or None, (B, T, V), (B, C)
class NewLLM(nn.Module, hub.PyTorchModelHubMixin):
    """Embeddings and head share a table (weight tying). Where Phase 2 freezes learned embeddings,
    because the contexts were made with them, the head goes on with a copy."""
    def __init__(self, config: Config, vocab_size: int = len(EVERY)):
        super().__init__()
        self.config, self.sweeps = config, 0
        self._hub_mixin_config = asdict(config) | dict(vocab_size=vocab_size)
        self.register_buffer("vocab", torch.tensor(EVERY[:vocab_size]))  # see Tokenizer
        self.embed = nn.Embedding(vocab_size, config.embed_dim)
        self.cell = Cell(config)
        self.dropout = nn.Dropout(config.dropout)
        self.query = nn.Linear(config.context_dim + config.embed_dim, config.embed_dim)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.embed.requires_grad_(config.embeddings == "learned")
        tied = config.joint or config.embeddings != "learned"
        self.head = None if tied else nn.Parameter(self.embed.weight.detach().clone())
        # 1 / temperature. Sharp scores learn by heart sooner, but overfit.
        self.sharpness = nn.Parameter(torch.tensor(10.0 if config.hold_out else 25.0))
    def embedded(self, ids):
        """ids (...) -> x (..., E). An unknown word is all zeros: it says nothing."""
        return F.layer_norm(self.embed(ids), self.embed.weight.shape[1:]) * (ids != UNK)[..., None]
    def states(self, ids, state=None, solver=None):
        """Context block: ids (B, T), the state before (B, C) or None -> states (B, T, C)."""
        u = self.cell.token_in(self.dropout(self.embedded(ids)))
        if state is None:
            state = u.new_zeros(len(u), self.config.context_dim)
        solver = solver or self.config.solver
        if solver == "auto":  # on a CPU the loop is as fast, unless dialogues are long and few
            solver = "parallel" if u.is_cuda or u.shape[1] > 256 * len(u) else "sequential"
        if solver == "sequential":
            return walk(self.cell, u, state)[0]
        states, self.sweeps = solve(self.cell, u, state)
        return states
    def logits(self, states, ids, table=None):
        """Token block and head: states (..., C), the tokens just read (...) -> (..., V). The score
        of word w is sharpness * cos(W [c, x] + v, e_w) + bias_w, with e_w from the table (V, E)."""
        if table is None:
            table = self.embed.weight if self.head is None else self.head
        both = torch.cat((context(states), self.embedded(ids)), -1)
        q = F.normalize(self.query(self.dropout(both)), dim=-1)
        return F.linear(self.sharpness * q, F.normalize(table, dim=-1), self.bias)
    def forward(self, input_ids, labels=None, state=None) -> Output:
        """ids (B, T), labels (B, T) as Hugging Face's (-100: ignored), an earlier call's state."""
        states = self.states(input_ids, state)
        logits, loss = self.logits(states, input_ids), None
        if labels is not None:
            following = F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        return Output(loss, logits, states[:, -1])
    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens=100, eos_token_id=IM_END, state=None,
                 do_sample=False, temperature=1.0):
        """ids (B, T) -> (B, T + new), as Hugging Face's generate(); state as in forward()."""
        ids, unread = input_ids, input_ids
        ended = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        while ids.shape[1] < input_ids.shape[1] + max_new_tokens and not ended.all():
            state = self.states(unread, state)[:, -1]
            logits = self.logits(state, unread[:, -1])
            logits[:, [UNK, IM_START]] = -math.inf  # nobody says these
            token = logits.argmax(-1)
            if do_sample and temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
            unread = token.masked_fill(ended, eos_token_id)[:, None]
            ids = torch.cat((ids, unread), 1)
            ended = ended | (unread[:, 0] == eos_token_id)
        return ids

def answer(model, text, max_new_tokens=200, **sampling) -> str:
    """The answer to a message. A model of a plain text continues it."""
    tokenizer = Tokenizer(model.vocab.tolist())
    encode = tokenizer.encode if is_text(model.config.data) else tokenizer.question
    ids = model.vocab.new_tensor([encode(text) or [UNK]])
    said = model.eval().generate(ids, max_new_tokens, **sampling)[0, ids.shape[1]:].tolist()
    return tokenizer.decode([i for i in said if i != IM_END]).strip()

# --- 5. Training: one loop for both phases ---
TABLE_RATE = 0.2  # embeddings and head learn at this share of the rate, or they overfit
DECAY = 1.0       # weight decay for new text
LAUNCHED = dist.is_available() and dist.is_torchelastic_launched()  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # of this process
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1  # how many there are

class Phase:
    """What both phases share: they add name, about, names of figures, loss()."""
    def __init__(self, model, train, val, passes, rate):
        config = self.config = model.config
        self.model, self.passes, self.device = model, passes, model.vocab.device
        self.keep = self.name == "Phase 1" or not max(config.joint, config.dropout, config.hold_out)
        self.train, self.val, self.fits = train, val, tokens_that_fit(model)
        self.progress = dict(done=0, steps=0, converged=0, over=False)
        self.learns = [p for p in model.parameters() if p.requires_grad]
        tables, decay = (model.embed.weight, model.head), DECAY if config.hold_out else 0.01
        rates = [rate * TABLE_RATE if any(p is t for t in tables) else rate for p in self.learns]
        groups = [dict(params=[p], weight_decay=decay * (p.dim() > 1)) for p in self.learns]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        few = sum(len(d.ids) for d in train) // (10 if config.hold_out else 80)  # steps a pass
        self.tokens = min(config.batch_tokens, max(64, few))
        steps = passes * len(batches_of(train, self.tokens)) + 1
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(  # warm up, then fall
            self.optimizer, rates, steps, pct_start=min(0.3, 10 / steps), cycle_momentum=False)
        self.parts = (model, self.optimizer, self.schedule)
        for d in train:
            d.states = None  # stale: Phase 1 still learned
        print(f"\n{self.name}: {self.about}; perplexity, e^loss")
    def fit(self, key, saved):
        """Train. `key` stands for the data, `saved` is a training.pt to go on from."""
        if saved:
            self.progress |= saved["progress"]
            for part in self.parts:
                part.load_state_dict(saved[type(part).__name__])
            for d, states in zip(self.train, saved["states"]):
                d.states = states
        self.save(key)
        now = self.progress
        while now["done"] < self.passes and not now["over"]:
            figures = self.run(self.train, learn=True)
            if self.val:
                for name, figure in self.run(self.val, learn=False).items():
                    figures[f"held-out {name}"] = figure
            now["done"] += 1
            now["over"] = not self.val and now["steps"] > 20 and now["converged"] >= ENOUGH
            self.save(key)
            shown = [f"{name} {value:.4g}" for name, value in figures.items()]
            print(f"{now['done']:5d} of {self.passes}", *shown, sep=" | ", flush=True)
    def save(self, key):
        """Write model.pt for chat.py and training.pt for --resume."""
        config, folder, done = asdict(self.config), Path(self.config.out), self.progress["done"]
        model = dict(config=config, model=self.model.state_dict(),
                     status=f"{self.name}, {done} of {self.passes} passes")
        training = {type(part).__name__: part.state_dict() for part in self.parts}
        training.update(config=config, phase=self.name, key=key, progress=self.progress,
                        states=[d.states for d in self.train])
        write(folder / "model.pt", lambda file: torch.save(model, file))
        write(folder / "training.pt", lambda file: torch.save(training, file))
    def run(self, dialogues, learn) -> dict[str, float]:
        """One pass over dialogues, to learn or only to look: means per word."""
        batches = batches_of(dialogues, self.tokens)
        random.Random(self.config.seed + self.progress["done"]).shuffle(batches)
        self.model.train(learn)
        with torch.set_grad_enabled(learn):
            sums = sum(map(self.step, tqdm(batches, disable=RANK > 0 or None, leave=False)))
        figures = dict(zip(self.names, (sums[1:] / sums[0]).tolist()))
        return figures | dict(perplexity=math.exp(min(figures["loss"], 99)))
    def step(self, batch):
        """Sums of a batch, longest last, in parts that fit; when learning, a step."""
        mine, longest, sums = batch[RANK::WORLD], len(batch[-1].ids), None
        torch.manual_seed(self.config.seed + self.progress["steps"] * WORLD + RANK)  # for --resume
        while sums is None:
            size = max(1, min(self.fits // longest, len(mine)))
            try:
                self.optimizer.zero_grad()
                parts = [self.compute(mine[k:k + size]) for k in range(0, len(mine), size)]
                sums = sum(parts, torch.zeros(1 + len(self.names), device=self.device))
            except RuntimeError as e:  # not all devices raise torch.OutOfMemoryError
                if "memory" not in str(e):
                    raise
                if size == 1:
                    raise UserError(f"{longest} tokens do not fit into memory; lower --max-len")
                self.fits = size // 2 * longest
                print(f"memory: too little, from now on {self.fits:,} tokens at a time")
        if WORLD > 1:
            dist.all_reduce(sums)
        if not sums.isfinite().all():
            raise UserError(f"the loss is {sums[1].item()}; lower --learning-rate, train anew")
        if self.model.training:
            for p in self.learns:  # the mean gradient of all words
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad / sums[0]
                if WORLD > 1:
                    dist.all_reduce(p.grad)
            nn.utils.clip_grad_norm_(self.learns, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.progress["steps"] += 1
        return sums
    def compute(self, part):
        """The sums of some dialogues; when learning, their gradient is added."""
        ids = pad_sequence([d.ids for d in part], True).to(self.device)  # filled up with UNK
        mask = pad_sequence([d.mask for d in part], True).to(self.device)  # and False
        stored = self.model.training and all(d.states is not None for d in part)
        before = pad_sequence([d.states for d in part], True).to(self.device) if stored else None
        loss, sums, states = self.loss(ids, mask, before)
        if self.model.training:
            loss.backward()
            for d, s in zip(part, states.detach().cpu()):
                d.states = s[:len(d.ids)] if self.keep else None
        return torch.stack(sums).detach()

def batches_of(dialogues, tokens) -> list[list[Dialogue]]:
    """Dialogues of similar length together, up to `tokens` with padding."""
    batches = []
    for d in sorted(dialogues, key=lambda d: len(d.ids)):
        if not batches or (len(batches[-1]) + 1) * len(d.ids) > tokens:
            batches.append([])
        batches[-1].append(d)
    return batches

def tokens_that_fit(model) -> int:
    """On a GPU half the free memory over a token's bytes: cell, three rows of scores."""
    if model.vocab.device.type != "cuda":
        return 8192
    cell = model.config.num_layers * model.config.hidden_dim + 2 * model.config.context_dim
    floats = 4 * RECORDED * cell + 3 * len(model.vocab)
    return max(1, torch.cuda.mem_get_info(model.vocab.device)[0] // (2 * 4 * floats))

# --- 6. Phase 1: learn the contexts of all tokens ---
DIVERSITY = 0.9   # w, the weight of diversity in the loss
CONVERGED = 0.01  # a context has converged when its mean squared change is below this
ENOUGH = 0.95     # Phase 1 ends when so many contexts have converged
USER = 0.1        # by heart, weight of words not the assistant's

class Phase1(Phase):
    """loss = (1 - w) CVFP + w diversity. CVFP (context vector fixed point) is the mean squared
    change of a context since the last pass: contexts settle. Diversity, a cross entropy, asks each
    to tell the next word from all others: contexts spread out (Wang & Isola 2020)."""
    name, names, last = "Phase 1", ("loss",), None  # last: contexts a pass ago
    about = f"loss (diversity) per word; change of contexts, share of changes below {CONVERGED}"
    def loss(self, ids, mask, before):
        """ids, mask (B, T), the last pass's states or None -> what to minimise; number of words
        and sums over them of the figures `names`; states (B, T, C)."""
        states = self.model.states(ids)
        at = ids[:, 1:] != UNK  # each context predicts the next token
        weight = torch.where(mask[:, 1:][at], 1.0, 1.0 if self.config.hold_out else USER)
        scores = self.model.logits(states[:, :-1][at], ids[:, :-1][at], self.model.embed.weight)
        diversity = weight @ F.cross_entropy(scores, ids[:, 1:][at], reduction="none")
        old = context(states if before is None else before)
        cvfp = weight @ (context(states) - old)[:, :-1][at].pow(2).mean(-1)
        return (1 - DIVERSITY) * cvfp + DIVERSITY * diversity, [weight.sum(), diversity], states
    def run(self, dialogues, learn):
        before = self.contexts(self.train) if learn and self.last is None else self.last
        figures = super().run(dialogues, learn)
        if learn:
            self.last = self.contexts(self.train)
            change = (self.last - before).pow(2).mean(-1)
            self.progress["converged"] = (change < CONVERGED).float().mean().item()
            figures |= dict(change=change.mean().item(), converged=self.progress["converged"])
        return figures
    @torch.no_grad()
    def contexts(self, dialogues, solver="parallel"):
        """(N, C): contexts of up to 4,096 tokens, read as one text."""
        ids = torch.cat([d.ids for d in dialogues])[None, :4096].to(self.device)
        return context(self.model.eval().states(ids, solver=solver)[0]).cpu()
    def report(self):
        for dialogues in filter(None, (self.val, self.train)):
            c = self.contexts(dialogues)
            far = (c - self.contexts(dialogues, "sequential")).abs().max()
            p = F.normalize(torch.linalg.svdvals(c - c.mean(0)), p=1, dim=0)
            rank = torch.special.entr(p).sum().exp() / c.shape[1]  # effective (Roy & Vetterli 2007)
            print(f"{'held-out' if dialogues is self.val else 'training'} contexts: effective "
                  f"rank {rank:.0%}; {self.model.sweeps} sweeps, {far:.0e} from the loop's")
        if not self.val and self.progress["converged"] < ENOUGH:
            print(f"advice: under {ENOUGH:.0%} converged; raise --iterations or --context-dim")
        if F.cosine_similarity(c[1:], c[:-1]).mean() > 0.99:
            print("warning: identity mapping, contexts hardly change; raise --samples")
        if F.normalize(c, dim=-1).mean(0).pow(2).sum() > 0.95:
            print("warning: global attractor, all contexts are alike; raise --context-dim")

# --- 7. Phase 2: learn what the assistant says ---
HOLES = 0.2   # share of words to hide, for new text
GENTLE = 0.2  # share of the rate after Phase 1, which trained the token block

class Phase2(Phase):
    """Cross entropy of the assistant's words, from kept contexts of the frozen context block. New
    text is harder to follow: with hold_out they are made anew, with other words hidden."""
    name, names = "Phase 2", ("loss", "right")
    about = "loss per word of the assistant, share of these words that are right"
    def loss(self, ids, mask, before):
        share = HOLES if self.model.training and self.config.hold_out else 0
        shown = ids.masked_fill((torch.rand(ids.shape) < share).to(ids.device), UNK)
        states = self.model.states(shown) if before is None else before
        at = mask[:, 1:]
        scores = self.model.logits(states[:, :-1][at], shown[:, :-1][at])
        words = ids[:, 1:][at]
        loss = F.cross_entropy(scores, words, reduction="sum")
        return loss, [at.sum(), loss, (scores.argmax(-1) == words).sum()], states

# --- 8. Files, GPT-2's embeddings, the command line, main ---
@contextlib.contextmanager
def explained(what, way_out):
    """Turns what goes wrong into a UserError: what failed, why, the way out."""
    try:
        yield
    except Exception as e:  # networks, files and disks raise anything
        cause = f"no {e}" if isinstance(e, KeyError) else f"{e}".strip() or type(e).__name__
        raise UserError(f"{what} ({cause.splitlines()[0][:150]}); {way_out}") from None

def write(path, content_to):
    """Write beside the place, then move: no crash leaves half a file."""
    new = path.with_suffix(f".{RANK}")  # each process has its own
    with explained(f"cannot write {path}", "free space, or name another folder: --out, --cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content_to(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)

def read_checkpoint(path) -> dict:
    """What Phase.save() wrote. No code in it is run."""
    with explained(f"cannot read {path}", "train first, as with python newllm.py --small"):
        saved = torch.load(path, "cpu", weights_only=True)
        Config(**dict(saved)["config"])  # raises if it is of another version
        return saved

def pick_device(name) -> torch.device:
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with explained(f"--device {name} is not there", f"this machine has {best.type}"):
        device = best if name == "auto" else torch.device(name)
        if LAUNCHED and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return torch.zeros(1, device=device).device

def make_model(config, vocab) -> NewLLM:
    """A fresh model, with GPT-2's embeddings if wanted (548 MB, downloaded once)."""
    if config.embeddings != "learned":
        try:
            with explained("cannot get GPT-2's embeddings", "go online, or --embeddings learned"):
                from safetensors import safe_open
                gpt2 = ("openai-community/gpt2", "model.safetensors")
                path = hub.try_to_load_from_cache(*gpt2)
                if not path:
                    hub.HfApi().model_info(gpt2[0])  # offline it fails at once
                    path = hub.hf_hub_download(*gpt2)
                with safe_open(path, "pt") as file:
                    table = file.get_tensor("wte.weight").float()  # (50257, 768)
            config.embeddings, config.embed_dim = "gpt2", table.shape[1]
        except UserError as e:
            if config.embeddings == "gpt2":
                raise
            config.embeddings = "learned"
            print(f"embeddings: {e}; now learned instead")
    torch.manual_seed(config.seed)
    model = NewLLM(config, len(vocab))
    model.vocab.copy_(torch.tensor(vocab))
    if config.embeddings == "gpt2":
        model.embed.weight.data.normal_(std=table.std().item())  # for the special tokens
        model.embed.weight.data[len(SPECIAL):] = table[vocab[len(SPECIAL):]]
    return model

def parse(argv) -> Config:
    """The command line as a Config: defaults, a preset, then what is typed."""
    def complain(message):
        raise UserError(f"{message} (see python newllm.py --help)")
    parser = argparse.ArgumentParser("newllm.py", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = complain
    presets = parser.add_mutually_exclusive_group()
    for name, (help, _) in PRESETS.items():
        presets.add_argument(flag(name), dest="preset", action="store_const", const=name, help=help)
    for f in fields(Config):
        kind = dict(type=f.type, choices=f.metadata["choices"] or None)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        help = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=help, **kind)
    typed = vars(parser.parse_args(argv))  # only what was typed
    preset = typed.pop("preset")
    if typed.get("resume"):
        others = [preset or "", *typed.keys() - {"resume", "out", "cache", "device"}]
        if any(others):
            complain(f"--resume takes the settings of its run; leave out {flag(max(others))}")
        out = Config(**typed).out
        return Config(**read_checkpoint(Path(out, "training.pt"))["config"] | typed | dict(out=out))
    if "data" in typed and is_file(typed["data"]):  # read whole, without a network
        typed = dict(samples=0, embeddings="learned") | typed
        preset = preset or "medium"
    return Config(**PRESETS[preset or "small"][1] | typed)

def train_model(config) -> NewLLM:
    """Both phases: the model to chat with."""
    saved = read_checkpoint(Path(config.out, "training.pt")) if config.resume else None
    device = pick_device(config.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train, val, vocab = load(config)
    model = make_model(config, vocab).to(device)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    key = zlib.crc32(torch.cat([torch.tensor(vocab), *(d.ids for d in train + val)]).numpy())
    if saved and saved["key"] != key:
        raise UserError(f"--resume: {config.data} has changed since the run began; train anew")
    if config.iterations and not (saved and saved["phase"] == Phase2.name):
        phase1 = Phase1(model, train, val, config.iterations, config.learning_rate)
        phase1.fit(key, saved)
        phase1.report()
        saved = None
        if model.head is not None:
            model.head.data.copy_(model.embed.weight)
    model.cell.requires_grad_(config.joint)
    model.embed.requires_grad_(config.joint and config.embeddings == "learned")
    rate = config.learning_rate * (GENTLE if config.iterations else 1)
    Phase2(model, train, val, config.epochs, rate).fit(key, saved)
    return model.eval()

@contextlib.contextmanager
def as_program(name, interrupted):
    """For newllm.py and chat.py: print any character, end without a traceback."""
    for stream in (sys.stdin, sys.stdout):
        getattr(stream, "reconfigure", dict)(errors="replace")
    notebook = "ipykernel" in sys.modules  # it shows errors
    try:
        yield
        print(end="", flush=True)  # a closed pipe raises here
    except KeyboardInterrupt:
        print(f"\n{interrupted}")
        if not notebook:
            sys.exit(130)
    except BrokenPipeError:  # as with | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as e:
        if notebook:
            raise
        print(f"{name}: {e}", file=sys.stderr)
        sys.exit(2)

def main(argv=None) -> NewLLM | None:
    """Train as the options say. In a notebook: model = main(["--small"])."""
    if argv is None:  # in a notebook, sys.argv is not ours
        argv = [] if "ipykernel" in sys.modules else sys.argv[1:]
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # the first one speaks
    start = time.perf_counter()
    torch.set_flush_denormal(True)  # numbers near 1e-40 are slow
    with as_program("newllm.py", "interrupted; once training has begun, --resume goes on"):
        model = train_model(parse(argv))
        print(f"\ndone in {time.perf_counter() - start:.0f} s; now python chat.py --checkpoint "
              f"{model.config.out}\n\nYou: hello\nNew-LLM: {answer(model, 'hello', 20)}")
        return model

if __name__ == "__main__":
    main()
