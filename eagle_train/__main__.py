"""`python -m eagle_train [WORD] [arguments]`: the first word picks the tool; none means `train`."""

from __future__ import annotations

import importlib
import keyword
import logging
import os
import select
import sys
from pathlib import Path
from typing import TextIO

from eagle_train.importing import no_garbage

TOOLS = {
    "train": "run or resume a training run from config overrides (the default)",
    "plan": "show parameters, freeze table, tokens, rows, steps and memory of a config, without weights or GPU",
    "data": "data sets: list, show, prepare, build, index, lint, stats, preview",
    "trace": "when a run saw a sample and what became of it; what a step held; which samples were bad",
    "replay": "make a step of a run again from its ledger, and compare rows and loss with the records",
    "report": "write one self-contained HTML file about a run",
    "chat": "ask a run or an export about images, videos and documents",
    "import": "turn a released Eagle, InternVL2 or Qwen2-VL checkpoint into a folder for chat and training",
    "export": "write a run's weights, config and tokenizer, in this package's layout or a released one",
}

HELP = f"""usage: python -m eagle_train [WORD] [arguments]

{chr(10).join(f"  {word:8} {text}" for word, text in TOOLS.items())}

  python -m eagle_train +experiment=toy                    train
  python -m eagle_train +experiment=toy schedule.sft.num_steps=50 run_dir=runs/short
  python -m eagle_train plan +experiment=toy               look before you run
  python -m eagle_train WORD --help                        about one word
"""


class Stderr(logging.Handler):
    """Writes to what is stderr at that moment, so that a live progress bar can put lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        print(self.format(record), file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Runs one tool and returns the exit code."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, handlers=[Stderr()]
    )
    word, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in TOOLS else ("train", arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    if word == "train" and rest and rest[0].isidentifier():
        print(f"no tool {rest[0]!r}; words: {', '.join(TOOLS)}", file=sys.stderr)
        return 2
    module = f"{word}_" if keyword.iskeyword(word) else word
    with no_garbage():
        tool = importlib.import_module(f"eagle_train.tools.{module}")
    try:
        return tool.main(rest)
    except ValueError as error:
        if not raised_by_us(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def raised_by_us(error: BaseException) -> bool:
    """Returns whether an error is a message of this package to its user, not a defect with a traceback to read."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def is_unread(stream: TextIO) -> bool:
    """Returns whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)  # an error is told of in any case
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run() -> int:
    """Runs the command line; a reader of its output that has seen enough, as `head` has, ends it in silence."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not is_unread(sys.stdout):
            raise  # another pipe, as that of a loader's worker
        # Python would flush stdout once more at its end, so that goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(run())
