"""Chat with a model that newllm.py has trained.

    python chat.py                            the model in checkpoints/
    python chat.py --prompt "who are you?"    one answer, then exit
    echo "hello" | python chat.py             a line in, an answer out

Each turn reads only the new words, never the history: the thousandth costs what the first one did.
"""
import argparse, codecs, contextlib, os, re, signal, sys, time
from pathlib import Path

import torch
from newllm import (IM_END, IM_START, UNK, Config, NewLLM, Tokenizer, UserError, as_program,
                    explained, flag, is_text, normalised, pick_device, read_checkpoint)

HELP = "/reset forgets all, /stats counts, Ctrl-C ends an answer, /quit or Ctrl-D the conversation"
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+")  # as GPT-2's tokens
OPTIONS = {  # name: kind, default, help, and of a number the least and the greatest
    "checkpoint": (str, "checkpoints", "folder of a run, or its model.pt"),
    "prompt": (str, None, "answer this once and exit"),
    "system": (str, None, "a message of the system, before all others"),
    "temperature": (float, None, "0: always the likeliest token (where sampled: 0.8)", 0, 1e6),
    "top_k": (int, 0, "sample from so many tokens; 0: from all", 0, 10 ** 6),
    "top_p": (float, 1.0, "sample from the likeliest adding up to p", 1e-6, 1),
    "repetition_penalty": (float, 1.0, "above 1 discourages words that were said", 0.1, 10),
    "num_beams": (int, None, "answers followed at a time, to say the likeliest; 1: sampling "
                  "(default: 5 after learning by heart, unless sampling is set)", 1, 1000),
    "max_new_tokens": (int, 200, "longest answer, tokens", 1, 10 ** 9),
    "seed": (int, None, "for the same answers again", 0, 2 ** 31 - 1),
    "device": (str, "auto", "cuda, mps, cpu or auto")}

def choose(logits, said, temperature, top_k, top_p, repetition_penalty):
    """The next token (B,), from logits (B, V) and the tokens before it, said (B, T)."""
    said = said.masked_fill(said == IM_END, UNK)  # answers could not end if it were punished
    scores = logits.gather(1, said)
    scores = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
    logits = logits.scatter(1, said, scores)
    logits[:, [UNK, IM_START]] = -torch.inf  # nobody says these
    if temperature == 0:
        return logits.argmax(-1)
    logits, tokens = (logits / temperature).sort(descending=True)
    logits[:, top_k or logits.shape[1]:] = -torch.inf
    p = logits.softmax(-1)  # next: the fewest tokens that add up to top_p (Holtzman et al. 2020)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0)
    return tokens.gather(1, torch.multinomial(p, 1))[:, 0]

class Chat:
    """A conversation: the state (1, C), and the tokens that it has not read yet."""
    def __init__(self, model, options):
        self.model, self.options = model, options
        self.tokenizer = Tokenizer(model.vocab.tolist())
        self.text = is_text(model.config.data)  # then it continues, without ChatML
        self.beams = options.num_beams or (1 if model.config.hold_out or self.text else 5)
        self.tensor = model.vocab.new_tensor  # makes integers, on the model's device
        self.reset()

    def reset(self):
        self.state, self.seen = None, 0  # seen: tokens that the state has read
        self.all_unknown, self.seconds, self.made, self.stop = {}, 0.0, 0, False
        messages = [dict(role="system", content=text) for text in [self.options.system] if text]
        self.unread = [] if self.text else self.tokenizer.dialogue(messages).ids.tolist()
        return "forgotten"

    @torch.no_grad()
    def answer(self, text: str):
        """Yield the answer in pieces of whole characters. Set self.stop, and it ends early."""
        start, decoder = time.perf_counter(), codecs.getincrementaldecoder("utf-8")("replace")
        words = WORDS.findall(text if self.text else normalised(text))
        self.unknown = {word.strip(): True for word in words
                        if UNK in self.tokenizer.encode(word)}  # the model reads nothing there
        self.all_unknown |= self.unknown
        self.unread += (self.tokenizer.encode if self.text else self.tokenizer.question)(text or "\n")
        self.cut = True
        try:
            for token in self.sampled() if self.beams == 1 else self.likeliest():
                self.cut = token != IM_END
                if self.stop or not self.cut:
                    break
                self.unread, self.made = self.unread + [token], self.made + 1
                number = self.tokenizer.vocab[token]
                yield decoder.decode(self.tokenizer.gpt2.decode_single_token_bytes(number))
        finally:
            if not self.text:  # ChatML closes a message, finished or not
                self.unread += [IM_END, *self.tokenizer.encode("\n")]
            self.seconds += time.perf_counter() - start

    def read(self):
        """Read what is unread, in pieces. Returns the logits (1, V) of the next token."""
        while self.unread:
            ids, self.unread = self.unread[:512], self.unread[512:] * (not self.stop)
            self.state = self.model.states(self.tensor([ids]), self.state)[:, -1]
            self.seen += len(ids)
        return self.model.logits(self.state, self.tensor(ids[-1:]))

    def sampled(self):
        """Yield tokens one by one. Each is unread until the next one is asked for."""
        o, said = self.options, list(self.unread)
        for _ in range(o.max_new_tokens):
            said.append(choose(self.read(), self.tensor([said]), o.temperature, o.top_k, o.top_p,
                               o.repetition_penalty).item())
            yield said[-1]

    def likeliest(self) -> list[int]:
        """Beam search for the best mean log-probability per token. A beam is a row of the state."""
        n, logits, state, start = self.beams, self.read(), self.state, time.perf_counter()
        totals, beams, done, V, mark = [0.0], [[]], [], logits.shape[1], ""
        for length in range(1, self.options.max_new_tokens + 1):
            if not mark and sys.stdout.isatty() and time.perf_counter() - start > 1:
                mark = "(thinking)"
                print(mark, end="", flush=True)
            logits[:, [UNK, IM_START]] = -torch.inf  # nobody says these
            scores = (logits.log_softmax(-1) + logits.new_tensor(totals)[:, None]).flatten()
            best, flat = (x.tolist() for x in scores.topk(min(2 * n, len(scores))))  # n may end
            grown = [(total, beams[i // V] + [i % V], i // V) for total, i in zip(best, flat)]
            done += [(total / length, beam) for total, beam, _ in grown[:n] if beam[-1] == IM_END]
            totals, beams, parents = zip(*[g for g in grown if g[1][-1] != IM_END][:n])
            if self.stop or len(done) >= n and max(done)[0] >= totals[0] / length:
                break
            last = self.tensor([beam[-1] for beam in beams])
            state = self.model.states(last[:, None], state[list(parents)])[:, -1]
            logits = self.model.logits(state, last)
        print("\b \b" * len(mark), end="")
        return max(done or [(total / length, beam) for total, beam in zip(totals, beams)])[1]

    def stats(self) -> str:
        names = [word[:20] for word in self.all_unknown]
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        return (f"{self.seen:,} tokens seen, state of {getattr(self.state, 'nbytes', 0):,} bytes, "
                f"{self.made / max(self.seconds, 1e-9):,.0f} tokens/s, "
                f"{len(names)} unknown words: {', '.join(names[:20]) or 'none'}{more}")

def parse(argv):
    parser = argparse.ArgumentParser("chat.py", None, "Chat with New-LLM.", allow_abbrev=False)
    def fail(message):
        raise UserError(f"{message} (python chat.py --help lists the options)")
    parser.error = fail
    for name, (kind, default, help, *_) in OPTIONS.items():
        help += "" if default is None else f" (default: {default})"
        parser.add_argument(flag(name), type=kind, default=default, help=help)
    o = parser.parse_args(argv)
    for name, (_, _, _, *limits) in OPTIONS.items():
        value = getattr(o, name)
        if limits and value is not None and not limits[0] <= value <= limits[1]:
            fail(f"{flag(name)} {value}: give {limits[0]} to {limits[1]}")
    sampling = o.temperature or o.top_k or o.top_p < 1 or o.repetition_penalty != 1
    if sampling and (o.num_beams or 1) > 1:
        fail("--num-beams takes no option of sampling")
    o.num_beams = o.num_beams or (1 if sampling or o.temperature == 0 else None)
    o.temperature = 0.8 if o.temperature is None else o.temperature
    return o

def open_model(name: str):
    """The model of a folder or a file, and how far its training is. Raises UserError."""
    path = Path(name, "model.pt") if Path(name).is_dir() else Path(name)
    if not path.exists():
        raise UserError(f"no model in {name}; train one first: python newllm.py --small")
    content = read_checkpoint(path)
    with explained(f"cannot use {path}", "it is damaged or of another version; train anew"):
        config = Config(**content["config"])
        model = NewLLM(config, len(content["model"]["vocab"]))
        model.load_state_dict(content["model"])
        *_, done, _, total, _ = content["status"].split()  # as "Phase 2, 10 of 10 passes"
        finished = content["status"].startswith("Phase 2") and done == total
    about = f"{path}, trained on {config.data}"
    return model.eval(), about if finished else f"{about}, in training: {content['status']}"

def say_to(chat: Chat, text: str, prefix: str = ""):
    """Print the answer. Ctrl-C sets a flag that is looked at between tokens: it is never lost."""
    chat.stop = False
    before = signal.signal(signal.SIGINT, lambda *_: setattr(chat, "stop", True))
    try:
        print(prefix, end="", flush=True)
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
        print(" ..." if chat.cut else "", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    if chat.unknown and sys.stdin.isatty() and sys.stdout.isatty():
        print(f"\033[2m(unknown words: {', '.join(chat.unknown)[:80]})\033[0m")  # dim

def converse(chat: Chat, about: str):
    """Answer lines of the terminal, or of a pipe, until they end."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{about}\n{HELP}")
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401, gives input() line editing and history
    while terminal or not chat.stop:  # who stops one line of a pipe means all of them
        try:
            text = input("You: " if terminal else "").strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                print({"/reset": chat.reset, "/stats": chat.stats}.get(text, lambda: HELP)())
            elif text:
                say_to(chat, text, "New-LLM: " if terminal else "")
        except EOFError:
            return print(end="\n" if terminal else "", flush=True)
        except KeyboardInterrupt:
            chat.stop = True
            print("\n(/quit or Ctrl-D leaves)" if terminal else "")

def main(argv=None):
    sys.stdin = sys.stdin or open(os.devnull)  # as a service has it
    with as_program("chat.py", "interrupted"):
        options = parse(sys.argv[1:] if argv is None else argv)
        torch.set_flush_denormal(True)  # numbers near 1e-40 make exp ten times slower
        torch.manual_seed(torch.seed() if options.seed is None else options.seed)
        model, about = open_model(options.checkpoint)
        chat = Chat(model.to(pick_device(options.device)), options)
        if "in training" in about:
            print(f"chat.py: {about}", file=sys.stderr)
        if options.prompt is not None:
            return say_to(chat, options.prompt)
        converse(chat, about)

if __name__ == "__main__":
    main()
