"""The command line: `jbn COMMAND`, also run by `python -m jbn` and train.py.

Commands are imported when they run: most need Orbax, Optax and Flax, but help does not.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from jbn.training.errors import NonFiniteLossError, StorageError, UsageError


# The commands, with a sentence each for the help.
COMMANDS = {
    "train": "Train a network with batch normalization, or resume a run.",
    "eval": "Evaluate a checkpoint on the test split.",
    "predict": "Apply a checkpoint to image files, or generate images.",
    "compile": "Compile the training step for given devices, and report its memory.",
    "inspect": "Report where batch norm differs between training and evaluation.",
    "recalibrate": "Recompute the running statistics from the training data.",
    "fold": "Fold batch norms into the adjacent linear layers, for inference.",
    "port": "Load the weights of a PyTorch model into a run.",
}


def main(
    args: Sequence[str] | None = None,
    *,
    prog: str = "jbn",
    default: str | None = None,
) -> int:
    """Runs the command line.

    Args:
        args: The command and its flags; by default those of the process.
        prog: The name of the program, for help.
        default: The command if none is named.

    Returns:
        The exit status: 0; 1 if the run or the check failed; 2 if it could not start;
        75 if SIGTERM stopped training, which --resume continues; 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    if default is not None and (not args or args[0] not in COMMANDS):
        args, name = [default, *args], prog
        if {"-h", "--help"} & set(args):
            print(overview(prog) + "\n")
    elif not args or args[0] in ("-h", "--help"):
        print(overview(prog))
        return 0 if args else 2
    else:
        name = f"{prog} {args[0]}"
    try:
        return _find(args[0])(args[1:], name)
    except (UsageError, NonFiniteLossError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted; nothing was trained or written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # As with `| head`. The flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def overview(prog: str) -> str:
    """The help on all commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        f"usage: {prog} COMMAND [FLAGS]\n\ncommands:\n"
        + "\n".join(lines)
        + f"\n\n{prog} COMMAND --help explains the flags of a command."
    )


def _find(name: str) -> Callable[[Sequence[str], str], int]:
    """The function of a command; it takes the flags and the name of the program."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(
            f"There is no command {name}.{hint} The commands are {', '.join(COMMANDS)}."
        )
    try:
        if name == "train":
            from jbn.training.loop import main

            return main
        if name == "compile":
            from jbn.training.compile import main

            return main
        import tyro

        if name in ("eval", "predict"):
            from jbn.training.subcommands import COMMANDS as functions
        else:
            from jbn.training.commands import COMMANDS as functions
    except ModuleNotFoundError as error:
        text = f'needs {error.name}: pip install "jbn[train]"'
        raise UsageError(f"jbn {name} {text}") from error
    options = (tyro.conf.FlagCreatePairsOff,)
    return lambda args, prog: tyro.cli(
        functions[name], args=args, prog=prog, config=options
    )
