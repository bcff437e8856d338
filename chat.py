"""Chat with a model that newllm.py has trained.

    python chat.py                            the newest best checkpoint in checkpoints/
    python chat.py --prompt "who are you?"    one answer, then exit
    echo "hello" | python chat.py             a line in, an answer out

The conversation lives in the model's state. Each turn feeds only the new words, never the history,
so the thousandth turn costs what the first one did.
"""
import argparse
import codecs
import contextlib
import sys
import time
from pathlib import Path

import torch

from newllm import (IM_END, Tokenizer, UserError, best_checkpoint, flag_of, load_model, pick_device)

HELP = "/reset forgets the conversation, /stats shows what it cost, /quit or Ctrl-D leaves"


class Chat:
    """A conversation: the state (1, C), and the tokens that it has not read yet."""

    def __init__(self, model, options):
        self.model, self.options, self.tokenizer = model, options, Tokenizer()
        self.device = model.embed.weight.device
        self.reset()

    def reset(self):
        self.state, self.unread, self.seen, self.seconds, self.made = None, [], 0, 0.0, 0

    def answer(self, text: str):
        """Yield the answer piece by piece, in whole characters. Ctrl-C ends it early."""
        o, start = self.options, time.perf_counter()
        ids = self.unread + self.tokenizer.question(text)
        self.seen += len(ids)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        stream = self.model.stream(
            torch.tensor([ids], device=self.device), o.max_new_tokens, o.temperature > 0,
            o.temperature, o.top_k, o.top_p, o.repetition_penalty, self.state)
        token, self.unread = None, ids
        try:
            for token, self.state in stream:
                token = token.item()
                self.unread = []
                self.made, self.seen = self.made + 1, self.seen + 1
                if token == IM_END:
                    break
                yield decoder.decode(self.tokenizer.bpe.decode_single_token_bytes(token))
        except KeyboardInterrupt:
            yield " ..."
        yield decoder.decode(b"", final=True)
        self.seconds += time.perf_counter() - start
        # the state has read all but the last token; ChatML closes a message, finished or not
        self.unread += [] if token in (None, IM_END) else [token]
        self.unread += [IM_END] + self.tokenizer.bpe.encode_ordinary("\n")

    def stats(self) -> str:
        size = 0 if self.state is None else self.state.numel() * self.state.element_size()
        speed = self.made / self.seconds if self.seconds else 0.0
        return f"{self.seen:,} tokens seen, state of {size:,} bytes, {speed:,.0f} tokens/s"


def parse(argv):
    parser = argparse.ArgumentParser("chat.py", description="Chat with a trained New-LLM.")
    parser.add_argument("--checkpoint", default="checkpoints", help="folder or .safetensors file")
    parser.add_argument("--prompt", help="answer this once and exit")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="the likeliest adding up to p")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest answer, tokens")
    parser.add_argument("--seed", type=int, help="for the same answers again")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")

    def fail(message):
        raise UserError(f"{message} (python chat.py --help lists the options)")
    parser.error = fail
    options = parser.parse_args(argv)
    for name, bad in (("temperature", not 0 <= options.temperature < float("inf")),
                      ("top_k", options.top_k < 0), ("top_p", not 0 < options.top_p <= 1),
                      ("repetition_penalty", not 0 < options.repetition_penalty < float("inf")),
                      ("max_new_tokens", options.max_new_tokens < 1)):
        if bad:
            raise UserError(f"{flag_of(name)} {getattr(options, name)} makes no sense; see --help")
    return options


def open_checkpoint(name: str, device: str):
    """The model of a checkpoint file, or of the best one in a folder."""
    path = Path(name)
    if path.is_dir() or not path.exists() and path.suffix != ".safetensors":
        path = best_checkpoint(path) if path.is_dir() else None
    if path is None:
        raise UserError(f"no checkpoint in {name}; train one first: python newllm.py --small")
    return load_model(path, str(pick_device(device)))[0], path


def say_to(chat: Chat, text: str):
    with contextlib.suppress(KeyboardInterrupt):  # between two tokens it is answer() that ends
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
    print()


def main(argv=None):
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if options.seed is not None:
            torch.manual_seed(options.seed)
        model, path = open_checkpoint(options.checkpoint, options.device)
        chat, terminal = Chat(model, options), sys.stdin.isatty()
        if options.prompt is not None:
            return say_to(chat, options.prompt)
        if terminal:
            print(f"{path}: {HELP}")
        while True:
            try:
                text = input("You: " if terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                return print() if terminal else None
            if text == "/quit":
                return
            if text == "/reset":
                chat.reset()
                print("forgotten")
            elif text == "/stats":
                print(chat.stats())
            elif text.startswith("/"):
                print(HELP)
            elif text:
                print("New-LLM: " if terminal else "", end="", flush=True)
                say_to(chat, text)
    except UserError as e:
        print(f"chat.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
