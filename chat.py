"""Chat with a model that newllm.py has trained.

    python chat.py                            the model in checkpoints/
    python chat.py --prompt "who are you?"    one answer, then exit
    echo "hello" | python chat.py             a line in, an answer out

Each turn reads only the new words, never the history: the thousandth costs what the first one did.
"""
import argparse, codecs, contextlib, os, re, signal, sys, time
from pathlib import Path

import torch
from newllm import (IM_END, IM_START, UNK, Tokenizer, UserError, choose, flag, pick_device,
                    read_checkpoint)

HELP = "/reset forgets all, /stats counts, Ctrl-C ends an answer, /quit or Ctrl-D the conversation"
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+")  # as GPT-2's tokens
OPTIONS = {  # name: kind, default, help, and of a number the least and the greatest
    "checkpoint": (str, "checkpoints", "folder or .pt file"),
    "prompt": (str, None, "answer this once and exit"),
    "temperature": (float, None, "0: always the likeliest token (where sampled: 0.8)", 0, 1e6),
    "top_k": (int, 0, "sample from so many tokens; 0: from all", 0, 10 ** 6),
    "top_p": (float, 1.0, "sample from the likeliest adding up to p", 1e-6, 1),
    "repetition_penalty": (float, 1.0, "above 1 discourages words that were said", 0.1, 10),
    "num_beams": (int, None, "answers followed at a time, to say the likeliest; 1: sampling "
                  "(default: 5 after learning by heart, unless sampling is set)", 1, 1000),
    "max_new_tokens": (int, 200, "longest answer, tokens", 1, 10 ** 9),
    "seed": (int, None, "for the same answers again", 0, 2 ** 31 - 1),
    "device": (str, "auto", "cuda, mps, cpu or auto")}

class Chat:
    """A conversation: the state (1, C), and the tokens that it has not read yet."""

    def __init__(self, model, options):
        self.model, self.options, self.tokenizer = model, options, Tokenizer(model.vocab)
        self.beams = options.num_beams or (1 if model.config.patience else 5)
        self.tensor = model.vocab.new_tensor  # makes integers, on the model's device
        self.reset()

    def reset(self):
        self.state, self.unread, self.seen = None, [], 0  # seen: tokens that the state has read
        self.all_unknown, self.seconds, self.made, self.stop = {}, 0.0, 0, False
        return "forgotten"

    @torch.no_grad()
    def answer(self, text: str):
        """Yield the answer in pieces of whole characters. Set self.stop, and it ends early."""
        start, decoder = time.perf_counter(), codecs.getincrementaldecoder("utf-8")("replace")
        self.unknown = {word.strip(): True for word in WORDS.findall(text)
                        if UNK in self.tokenizer.encode(word)}  # the model reads nothing there
        self.all_unknown |= self.unknown
        self.unread += self.tokenizer.question(text)
        try:
            for token in self.sampled() if self.beams == 1 else self.likeliest():
                if token == IM_END or self.stop:
                    break
                self.unread, self.made = self.unread + [token], self.made + 1
                yield decoder.decode(self.tokenizer.bytes_of(token))
        finally:  # ChatML closes a message, finished or not
            self.unread += [IM_END, *self.tokenizer.encode("\n")]
            self.seconds += time.perf_counter() - start

    def read(self):
        """Read what is unread, in pieces. Returns the logits (1, V) of the next token."""
        while self.unread:
            ids, self.unread = self.unread[:512], self.unread[512:]
            self.state = self.model.states(self.tensor([ids]), self.state)[:, -1]
            self.seen += len(ids)
        return self.model.logits(self.state)

    def sampled(self):
        """Yield tokens one by one. Each is unread until the next one is asked for."""
        o, said = self.options, list(self.unread)
        for _ in range(o.max_new_tokens):
            said.append(choose(self.read(), self.tensor([said]), o.temperature > 0, o.temperature,
                               o.top_k, o.top_p, o.repetition_penalty).item())
            yield said[-1]

    def likeliest(self) -> list[int]:
        """Beam search for the best mean log-probability per token. A beam is a row of the state."""
        n, logits, state = self.beams, self.read(), self.state
        totals, beams, done, V = [0.0], [[]], [], logits.shape[1]
        for length in range(1, self.options.max_new_tokens + 1):
            logits[:, [UNK, IM_START]] = -torch.inf  # nobody says these
            scores = (logits.log_softmax(-1) + logits.new_tensor(totals)[:, None]).flatten()
            best, flat = (x.tolist() for x in scores.topk(min(2 * n, len(scores))))  # n may end
            grown = [(total, beams[i // V] + [i % V], i // V) for total, i in zip(best, flat)]
            done += [(total / length, beam) for total, beam, _ in grown[:n] if beam[-1] == IM_END]
            totals, beams, parents = zip(*[g for g in grown if g[1][-1] != IM_END][:n])
            if self.stop or len(done) >= n and max(done)[0] >= totals[0] / length:
                break
            last = self.tensor([beam[-1:] for beam in beams])
            state = self.model.states(last, state[list(parents)])[:, -1]
            logits = self.model.logits(state)
        return max(done + [(total / length, beam) for total, beam in zip(totals, beams)])[1]

    def stats(self) -> str:
        return (f"{self.seen:,} tokens seen, state of {getattr(self.state, 'nbytes', 0):,} bytes, "
                f"{self.made / max(self.seconds, 1e-9):,.0f} tokens/s, "
                f"{len(self.all_unknown)} unknown words: {', '.join(self.all_unknown) or 'none'}")

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
            fail(f"{flag(name)} {value}: give {limits[0]:g} to {limits[1]:g}")
    sampling = o.temperature or o.top_k or o.top_p < 1 or o.repetition_penalty != 1
    if sampling and (o.num_beams or 1) > 1:
        fail("--num-beams takes no --temperature, --top-k, --top-p or --repetition-penalty")
    o.num_beams = o.num_beams or (1 if sampling or o.temperature == 0 else None)
    o.temperature = 0.8 if o.temperature is None else o.temperature
    return o

def open_checkpoint(name: str):
    """The model to chat with, of a file or a folder, and its path."""
    path, best = Path(name), Path(name) / "phase2-best.pt"
    path = max(path.glob("phase?-*.pt"), default=path)  # phase2-last.pt, if it is there
    if not path.is_file():
        raise UserError(f"no checkpoint in {name}; train one first: python newllm.py --small")
    model, checkpoint = read_checkpoint(path)
    if best.exists() and model.config.patience:  # 0: by heart, where the last is best
        path, (model, checkpoint) = best, read_checkpoint(best)
    if checkpoint["phase"] != "phase2":
        raise UserError(f"{path} is of Phase 1, which has learned contexts but cannot speak yet; "
                        f"let newllm.py finish, or go on with --resume")
    return model.eval(), path

def say_to(chat: Chat, text: str, prefix: str = ""):
    """Print the answer. Ctrl-C sets a flag that is looked at between tokens: it is never lost."""
    chat.stop = False
    before = signal.signal(signal.SIGINT, lambda *_: setattr(chat, "stop", True))
    try:
        print(prefix, end="", flush=True)
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
        print(" ..." if chat.stop else "", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    if chat.unknown and sys.stdin.isatty() and sys.stdout.isatty():
        print(f"\033[2m(unknown words: {', '.join(chat.unknown)[:80]})\033[0m")  # dim

def main(argv=None):
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        torch.set_flush_denormal(True)  # numbers near 1e-40 make exp ten times slower
        torch.manual_seed(torch.seed() if options.seed is None else options.seed)
        sys.stdin = sys.stdin or open(os.devnull)  # as a service has it
        for stream in (sys.stdin, sys.stdout):  # a StringIO of a test lacks it
            getattr(stream, "reconfigure", dict)(errors="replace")
        model, path = open_checkpoint(options.checkpoint)
        chat, terminal = Chat(model.to(pick_device(options.device)), options), sys.stdin.isatty()
        if options.prompt is not None:
            return say_to(chat, options.prompt)
        if terminal:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401, gives input() line editing and history
            print(f"{path}: {HELP}")
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
    except UserError as e:
        sys.exit(print(f"chat.py: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as with | head -1: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

if __name__ == "__main__":
    main()
