"""The verb `selfpruner recover`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfpruner_hub.cli.options import Result, number, path, quieten, settings_of, whole, writer
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.settings import check_seed

if TYPE_CHECKING:
    from selfpruner_hub.storage.model_record import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument("directory", metavar="DIR", type=Path, help="a pruned model that was saved")
    parser.add_argument("--against", required=True, metavar="PARENT", help="the dense model that it was pruned from")
    parser.add_argument("--against-gguf-file", metavar="FILE", help="load its weights from this GGUF file of it")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=number, metavar="N", help="minutes in all")
    length.add_argument("--tokens", type=whole, metavar="N", help="tokens to train on, in place of minutes")
    parser.add_argument("--output", type=path, metavar="DIR", help="where the recovered model goes (default: DIR)")
    parser.add_argument(
        "--data", help="chat, self, wikitext2, c4, or a .txt or .jsonl file; several with + between them (default: "
        "chat+wikitext2 for a chat model, else self+wikitext2)",
    )  # fmt: skip
    writer(parser)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--run-dir", type=path, metavar="DIR", help="texts and checkpoints (default: OUTPUT.run)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: the accelerator where there is one)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting; docs/recovery.md has them"
    )


def run(options: argparse.Namespace) -> Result:
    """Recover a saved model, and save it.

    Args:
        options: Parsed command line; its attribute `resume_hint` is set to the message for an interrupted run.

    Returns:
        One line for each text that decided, or JSON.

    Raises:
        UserError: An option is wrong, or a model or the text cannot be loaded.
        OutputError: The output cannot be written.
    """
    from selfpruner_hub.endpoint import check_writer
    from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, read_record
    from selfpruner_hub.storage.run_lock import default_run_dir, output_lock
    from selfpruner_hub.storage.staging import check_replaceable, check_writable

    settings = settings_of(options.set)
    # All that is wrong is said before torch and the models are loaded, which takes seconds.
    resolve_recovery(**settings)
    RecoveryBudget(options.minutes, options.tokens)
    check_seed(options.seed)
    check_writer(options.writer, options.writer_model)
    output: Path = options.output or options.directory
    read_record(options.directory)
    check_writable(output)
    check_replaceable(output, MODEL_RECORD_FILE, overwrite=False)
    run_dir = options.run_dir or default_run_dir(output)
    options.resume_hint = f"What was trained is in {run_dir}: the same command again goes on from there."

    from selfpruner_hub.models.loading import load_model
    from selfpruner_hub.provenance import revision_of
    from selfpruner_hub.pruned_model import PrunedModel
    from selfpruner_hub.ranks import from_first, is_first, joined, leave

    with joined(options.device), ExitStack() as stack:
        first = is_first()
        options.quiet |= not first
        quieten(options)
        from_first(lambda: stack.enter_context(output_lock(output, run_dir)))
        pruned = PrunedModel.from_pretrained(options.directory, device=options.device, dtype="auto")
        files: dict[str, Any] = revision_of(pruned.report, options.against)
        files |= {"gguf_file": options.against_gguf_file} if options.against_gguf_file else {}
        parent, _ = load_model(options.against, device=options.device, dtype=pruned.model.dtype, **files)
        recovered = pruned.recover(
            parent,
            minutes=options.minutes,
            tokens=options.tokens,
            data=options.data,
            writer=options.writer,
            writer_model=options.writer_model,
            seed=options.seed,
            run_dir=run_dir,
            progress=not options.quiet,
            **settings,
        )
        if first and (recovered is not pruned or output != options.directory):
            recovered.save_pretrained(output)
    leave()
    if not first:
        return Result()
    record = read_record(output)
    if options.json:
        return Result(json.dumps({"output": str(output), "improved": recovered is not pruned, **asdict(record)}))
    if recovered is pruned:
        return Result(f"{output}: not improved, and left as it was.")
    return Result("\n".join(recovery_lines(str(output), record)))


def recovery_lines(name: str, record: Record) -> list[str]:
    """Describe the gain of a recovery in lines of text.

    Args:
        name: Name of the model.
        record: Record of the model.

    Returns:
        One line, and one for each text that decided; none for a model that was not recovered.
    """
    if (recovery := record.recovery) is None:
        return []
    return [
        f"{name}: trained on {recovery['tokens']:,} tokens in {recovery['minutes']} minutes",
        *(
            f"KL from the parent on {text['name']}: {text['before']:.4f} -> {text['after']:.4f}"
            for text in recovery["deciding"]
        ),
        *(
            f"plain questions of {answers['asked']} that the parent answers: {answers['before']} -> {answers['after']}"
            for answers in [recovery.get("answers")]
            if answers
        ),
    ]
