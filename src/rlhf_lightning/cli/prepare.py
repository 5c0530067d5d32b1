"""`rlhf prepare`: data to a folder of token ids that every stage reads, and a report of what was kept, cut and dropped.

The signature of `prepare` is the config; its docstring is the help.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from jsonargparse import auto_cli
from rich.console import Console

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import PlainFormat
from rlhf_lightning.cli.recipes import config_paths, read_config
from rlhf_lightning.cli.stages import OneLineParser, user_error
from rlhf_lightning.data.fitting import check_context, check_ids
from rlhf_lightning.data.limits import RANGES, TokenLimits
from rlhf_lightning.data.preparing.filters import Filters, Splits
from rlhf_lightning.data.preparing.manifest import MANIFEST, PARTS, PROMPT_HASHES, file_name, is_prepared
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.data.preparing.prepared import PreparedFolder
from rlhf_lightning.data.preparing.report import REPORT_FILES, print_report, report_on, save_report
from rlhf_lightning.data.rows import KINDS
from rlhf_lightning.data.sources import DataSource, as_source
from rlhf_lightning.data.sources.ratings import RatingMargins
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.reward_functions import import_from_working_folder
from rlhf_lightning.models.tokenizer import load_tokenizer
from rlhf_lightning.warning_filters import filter_warnings


def prepare(
    out: str | Path,
    tokenizer: str,
    data: DataSource,
    validation_data: DataSource | None = None,
    test_data: DataSource | None = None,
    columns: dict[str, str] | None = None,
    rating_margins: RatingMargins | None = None,
    kinds: list[Literal["finetune", "preference", "prompts", "rated"]] | None = None,
    attributes: list[str] | None = None,
    validation_split: float = 0.1,
    test_split: float = 0.0,
    stage_split: dict[str, float] | None = None,
    split_by: Literal["dialogue", "prompt"] = "dialogue",
    num_samples: int | None = None,
    filters: Filters = Filters(),  # noqa: B008, frozen
    max_length: int = 512,
    max_prompt_length: int | None = None,
    response_room: int | None = None,
    minimum_response_length: int = 0,
    long_prompts: Literal["cut", "drop"] = "cut",
    dialogue_format: Literal["auto", "chat_template", "plain"] = "auto",
    plain_format: PlainFormat = PlainFormat(),  # noqa: B008, frozen
    chat_template: str | None = None,
    find_turns: bool = False,
    on_bad_row: Literal["auto", "skip", "error"] = "auto",
    num_proc: int = 1,
    num_examples: int = 10,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> PreparedFolder:
    """Turn data into token ids, once, for all stages, and report what was kept, cut and dropped.

    Args:
        out: folder to write; it appears only when it is complete.
        tokenizer: folder or hub id of the tokenizer, or of the model it belongs to.
        data: a file (.json, .jsonl, .csv, .tsv, .parquet, also gzipped), a list, folder or glob of such files, a
            `save_to_disk` folder, a hub id `owner/name` or `owner/name:split`, or a source class of YAML, such as
            rlhf_lightning.Blend.
        validation_data: the same for validation; without it the `validation` split of `data`, or a part held out.
        test_data: the same for testing; without it the `test` split of `data`, or a part held out.
        columns: our column names (prompt, response, chosen, rejected, messages and so on) to those of the data.
        rating_margins: margin of each rating that stands in a column `rating`; `small` or `large` for those of Llama 2.
        kinds: what to make; by default all that the columns allow.
        attributes: names of the scores that responses are given, each a column of numbers: for rated responses.
        validation_split: share of the prompts held out for validation.
        test_split: share of the prompts held out for testing.
        stage_split: share of the prompts for each stage, such as `{sft: 0.2, reward: 0.4, ppo: 0.4}`, or `dpo` in the
            place of `reward`; by default every stage gets all.
        split_by: what stays on one side of all splits: a `dialogue` at all its depths, by its system turns and its
            first turn of the user, or only one `prompt`, to its end. Prompts that are not dialogues fall alike.
        num_samples: read only this many rows of `data`.
        filters: which rows are left out.
        max_length: most tokens of prompt and response together, special tokens included.
        max_prompt_length: most tokens of the prompt; by default what the response leaves.
        response_room: room kept for the response whatever the prompt, in tokens; by default a quarter of `max_length`.
        minimum_response_length: drop rows with a response of fewer tokens, the EOS not counted.
        long_prompts: cut a prompt that is too long, or drop the row.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else in the plain
            format, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        plain_format: how dialogues are written that go through no template.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        find_turns: note where the assistant spoke earlier, which `loss_on: turns` needs.
        on_bad_row: stop at the first bad row, skip and count them all, or skip them up to 1% of the rows. Only with
            `skip` a run goes on of whose rows fewer than 10% serve what they are for.
        num_proc: processes that may tokenise, where there is text enough for them to pay; the result does not depend on
            it.
        num_examples: how many examples the report writes out.
        trust_remote_code: run tokenizer code that comes with the folder or hub model.
        overwrite: replace a prepared folder.

    Returns:
        The folder, which holds the report too: `report.json`, `report.txt`, `lengths.png`.

    Raises:
        UserError: data that cannot be used, or a folder that must not be replaced.
    """
    check_arguments(prepare, locals(), RANGES)
    folder = Path(out).expanduser().absolute()
    _check_out(folder, overwrite)
    limits = TokenLimits(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        response_room=response_room,
        long_prompts=long_prompts,
        minimum_response_length=minimum_response_length,
    )
    splits = Splits(validation=validation_split, test=test_split, stages=stage_split, by=split_by)
    rated = tuple(attributes or ())
    loaded = load_tokenizer(tokenizer, trust_remote_code)
    check_context(loaded, "max_length", max_length, "pass --max_length")
    preparation = Preparation(
        data=as_source(data, columns, rated, rating_margins),
        validation_data=None if validation_data is None else as_source(validation_data, columns, rated, rating_margins),
        test_data=None if test_data is None else as_source(test_data, columns, rated, rating_margins),
        chat=ChatEncoder(loaded, dialogue_format, chat_template, plain_format),
        limits=limits,
        kinds=None if kinds is None else tuple(kinds),
        filters=filters,
        splits=splits,
        num_samples=num_samples,
        on_bad_row=on_bad_row,
        find_turns=find_turns,
        num_proc=num_proc,
    )
    _build_beside(preparation, folder, num_examples, overwrite)
    return PreparedFolder.open(folder)


_OURS = {MANIFEST, PROMPT_HASHES, "args.json", "example_prompt.json", *REPORT_FILES} | {
    file_name(kind, part) for kind in KINDS for part in PARTS
}


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not is_prepared(out):
        raise UserError(f"--out: {out} is not empty and not a prepared folder; name another")
    if not overwrite:
        raise UserError(f"--out: {out} holds prepared data already; name another, or replace it with --overwrite true")
    if others := sorted({path.name for path in out.iterdir()} - _OURS):
        raise UserError(
            f"--out: {out} holds more than prepared data ({others[0]}), so it is not replaced; name another"
        )


def _build_beside(preparation: Preparation, out: Path, num_examples: int, overwrite: bool) -> None:
    """Write folder and report into a hidden folder beside `out`, then move them into place."""
    workplace = out.parent / f".{out.name}.unfinished"
    try:
        workplace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made ({error.strerror}); name another") from error
    try:
        with FileLock(workplace / "lock", blocking=False):
            new, old = workplace / "new", workplace / "old"
            try:
                if old.exists() and not out.exists():  # a run was killed between two renames
                    old.rename(out)
                _check_out(out, overwrite)  # another run may have been faster
                shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
                new.mkdir(parents=True)
                with Console(stderr=True).status("preparing"):
                    preparation.build(new)
                folder = PreparedFolder.open(new)
                check_ids(preparation.chat.tokenizer, lambda: max(map(folder.largest_id, folder.manifest["kinds"])))
                save_report(folder, report_on(folder, preparation.chat.tokenizer, num_examples))
                _move(new, out, old)
            except OSError as error:
                if error.filename is not None:
                    raise
                reason = os.strerror(error.errno) if error.errno else str(error)  # Arrow names no file
                raise UserError(f"--out: {out} cannot be written ({reason}); make room, or name another") from error
            finally:
                _leave(workplace, [new, old] if out.exists() else [new])
    except Timeout as error:
        raise UserError(f"--out: another `rlhf prepare` is writing {out}; wait for it or name another") from error


def _leave(workplace: Path, folders: Sequence[Path]) -> None:
    """Take away what a run has made for itself, and nothing else that may lie there."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    (workplace / "lock").unlink(missing_ok=True)
    if not any(workplace.iterdir()):
        workplace.rmdir()


def _move(new: Path, out: Path, old: Path) -> None:
    """Put `new` in the place of `out`, or leave `out` as it was."""
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _check_words(options: Sequence[str]) -> None:
    """Refuse what belongs to the stages."""
    if any(word.partition("=")[0] == "--data.data" for word in options):
        raise UserError("--data.data belongs to the stages; `rlhf prepare` takes --data")
    for path in config_paths(options):
        if "model" in read_config(path):
            raise UserError(f"config '{path}' is one of a stage; `rlhf prepare` takes data.yaml and its like")


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf prepare`: prepare, print the report, and say where everything is.

    Args:
        options: the words after `prepare`, recipes resolved.

    Raises:
        UserError: something the user can fix.
    """
    filter_warnings()
    import_from_working_folder()  # sources of one's own
    _check_words(options)
    try:
        folder: PreparedFolder = auto_cli(
            prepare,
            args=list(options),
            as_positional=False,
            parser_class=OneLineParser,
            config_help="A recipe or YAML file; later ones win.",
            prog="rlhf prepare",
            usage="rlhf prepare --config RECIPE --out DIR [options]",
            description="",
        )
    except ValueError as error:
        if mendable := user_error(error):
            raise mendable from error
        raise
    console = Console()
    print_report(console, json.loads((folder.path / "report.json").read_text(encoding="utf-8")))
    console.print()
    for name, path in (("folder", ""), ("report", "report.txt"), ("lengths", "lengths.png")):
        console.print(f"{name:8}{folder.path / path}", soft_wrap=True, highlight=False, markup=False)
