"""Bad input: one line that begins with "error: ", exit code 2, no traceback, and nothing left on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.cli_runs import PPO, REWARD, SFT, dialogue, run, save_model, save_pairs, save_rows, short
from rlhf_lightning.cli.errors import one_line
from rlhf_lightning.cli.main import main

BASE = ["fit", *SFT, *short("lm", "pairs.jsonl", "run")]
PPO_RUN = ["fit", *PPO, *short("lm", "pairs.jsonl", "run")]
ANSWERS = ["--policy=lm", "--reward=operator.eq", "--data=pairs.jsonl"]
FILES = {
    "broken.yaml": "trainer:\n  max_steps: 3\n model: [1\n",
    "list.yaml": "- 1\n",
    "top.yaml": "modle: 3\n",
    "inside.yaml": "model: {class_path: rlhf_lightning.SFTModule, init_args: {model_name_or_pth: lm}}\n",
    "nested.yaml": "model: {init_args: {sampling: {topk: 3}}}\n",
    "bare.yaml": "model: {init_args: {finetune: }}\n",
    "guard.yaml": "trainer: {callbacks+: [{class_path: rlhf_lightning.MetricGuard}]}\n",
    "trainer_bare.yaml": "trainer:\n",
    "init_bare.yaml": "model: {init_args: }\n",
    "twice.yaml": "trainer: {max_steps: 1}\ntrainer: {max_epochs: 1}\n",
    "classless.yaml": "model: {class_path: rlhf_lightning.SFTModule}\ndata: {init_args: {data: pairs.jsonl}}\n",
    "path.yaml": "data: some/file.jsonl\n",
    "class.yaml": "model: {class_path: rlhf_lightning.SFTModul}\n",
    "module.yaml": "model: {class_path: nowhere.SFTModule}\n",
    "trainer.yaml": "trainer: {max_stepz: 3}\n",
    "circle.yaml": "model: &a {init_args: *a}\n",
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a"\n',
    "bad.ckpt": "PK\x03\x04 nonsense",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "lm")
    save_pairs(folder / "pairs.jsonl")
    save_rows(folder / "columns.jsonl", [{"note": "a", "label": 1}])
    save_rows(folder / "null.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": None, "response": "b"}])
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    save_rows(folder / "messages.jsonl", [{"messages": turns}] * 4)
    save_rows(folder / "four.jsonl", [{"prompt": dialogue(i, "")} for i in range(4)])
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "empty_folder").mkdir()
    torch.save({"weights": torch.zeros(2)}, folder / "other.ckpt")
    return folder


CASES = [
    (["fti"], "unknown command 'fti'; did you mean `rlhf fit`?"),
    (["sing"], "unknown command 'sing'; see `rlhf --help`"),
    (["fit", "--config", "nope.yaml"], "config 'nope.yaml' is neither in the working folder nor a recipe (data.yaml, "),
    (["fit", "--config"], "--config names no file; pass a recipe (data.yaml, "),
    (["fit", "--config", "broken.yaml"], "config 'broken.yaml' line 3: broken YAML ("),
    (["fit", "--config", "list.yaml"], "config 'list.yaml' holds no 'key: value' lines"),
    (["fit", "--config", "lm/model.safetensors"], "config 'lm/model.safetensors' is no text file"),
    (
        ["fit"],
        "nothing says which model and data class to use; pass --config with a recipe "
        "(dpo.yaml, grpo.yaml, ppo.yaml, regression.yaml, reward.yaml, rloo.yaml, sft",
    ),
    (["train"], "unknown command 'train'; did you mean `rlhf fit`?"),
    (["reward"], "unknown command 'reward'; did you mean `rlhf fit --config reward.yaml`?"),
    (["fit", "sft.yaml"], "unexpected word 'sft.yaml'; options begin with --; did you mean --config sft.yaml?"),
    (
        ["fit", "--config", "deepspeed_zero3"],
        "config 'deepspeed_zero3' is neither in the working folder nor a recipe (",
    ),
    (["fit", "-config", "sft.yaml"], "unexpected word '-config'; options begin with two dashes: --config"),
    (
        ["fit", "--model.model_name_or_path=lm", "--data.data=pairs.jsonl"],
        "nothing says which model and data class to use; pass --config with a recipe (",
    ),
    (["fit", "--config=classless.yaml"], "nothing says which data class to use; pass --config with a recipe ("),
    (
        [*BASE, "--data", "pairs.jsonl"],
        "--data pairs.jsonl: --data names a class; did you mean --data.data pairs.jsonl?",
    ),
    ([*BASE, "--model=lm"], "--model lm: --model names a class; did you mean --model.model_name_or_path lm?"),
    (
        [*BASE, "--config=path.yaml"],
        "--data some/file.jsonl: --data names a class; did you mean --data.data some/file.js",
    ),
    (
        [*BASE, "--data.tokenizer=lm"],
        "data.tokenizer: leave it out, the stages take that of --model.model_name_or_path",
    ),
    (
        [*BASE, "--model.optimiser.lr=1e-4"],
        "unknown key 'model.optimiser.lr': SFTModule has no such argument; did you mean 'model.optimizer.lr'?",
    ),
    (
        [*BASE, "--model.finetune", "lora"],
        "--model.finetune lora: model.finetune has settings of its own; did you mean --model.finetune.mode lora?",
    ),
    (
        [*BASE, "--model.sampling=3"],
        "--model.sampling 3: model.sampling has settings of its own; set --model.sampling.",
    ),
    (
        [*BASE, "--trainer", "cpu"],
        "--trainer cpu: trainer has settings of its own; did you mean --config trainer/cpu.ya",
    ),
    ([*BASE, "--lr", "3"], "unknown key 'lr'; did you mean 'model.optimizer.lr'?"),
    ([*BASE, "--epochs=3"], "unknown key 'epochs'; did you mean 'trainer.max_epochs'?"),
    ([*BASE, "--optimizer=torch.optim.SGD"], "unknown key 'optimizer'; did you mean 'model.optimizer'?"),
    (
        [*BASE, "--model.model-name-or-path=lm"],
        "unknown key 'model.model-name-or-path': SFTModule has no such argument; did you mean 'model.model_name_or_p",
    ),
    ([*BASE, "--overwrite"], "--overwrite needs a value: --overwrite true"),
    (
        [*BASE, "--model.optimizer=adamw"],
        "model.optimizer: there is no class 'adamw'; did you mean 'torch.optim.AdamW'?",
    ),
    (
        [*BASE, "--trainer.callbacks=[{class_path: ModelCheckpiont}]"],
        "trainer.callbacks: there is no class 'ModelCheckpiont'; did you mean 'pytorch_lightning.callbacks.ModelCheckp",
    ),
    (["prepare", "--data.data=pairs.jsonl"], "--data.data belongs to the stages; `rlhf prepare` takes --data"),
    (["prepare", "--config=inside.yaml"], "config 'inside.yaml' is one of a stage; `rlhf prepare` takes data.yaml and"),
    (["prepare", "--model=lm", "--data=pairs.jsonl", "--out=x"], "unknown key 'model'; did you mean 'tokenizer'?"),
    ([*BASE, "--config=top.yaml"], "unknown key 'modle'; did you mean 'model'?"),
    ([*BASE, "--config=trainer.yaml"], "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
    (
        [*BASE, "--config=inside.yaml"],
        "unknown key 'model.model_name_or_pth': SFTModule has no such argument; did you mean "
        "'model.model_name_or_path'?",
    ),
    (
        [*BASE, "--config=nested.yaml"],
        "unknown key 'model.sampling.topk': SFTModule has no such argument; did you mean 'model.sampling.top_k'?",
    ),
    (
        [*BASE, "--config=class.yaml"],
        "model: there is no class 'rlhf_lightning.SFTModul'; did you mean 'rlhf_lightning.SFTModule'?",
    ),
    ([*BASE, "--config=module.yaml"], "model: there is no Python module 'nowhere'"),
    ([*BASE, "--model=PPOModul"], "model: there is no class 'PPOModul'; did you mean 'rlhf_lightning.PPOModule'?"),
    ([*BASE, "--trainer.max_stepz=3"], "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
    (
        [*BASE, "--model.smapling.top_k", "3"],
        "unknown key 'model.smapling.top_k': SFTModule has no such argument; did you mean 'model.sampling.top_k'?",
    ),
    (
        [*BASE, "--model.optimizer.lrr", "3"],
        "unknown key 'model.optimizer.lrr': AdamW has no such argument; did you mean 'model.optimizer.lr'?",
    ),
    ([*BASE, "extra"], "unexpected word 'extra'; options begin with --"),
    ([*BASE, "--trainer.max_steps=many"], "trainer.max_steps: expected int, got many"),
    ([*BASE, "--model.sampling.top_k=five"], "model.sampling.top_k: expected int, got five"),
    ([*BASE, "--model.optimizer.lr=high"], "model.optimizer.lr: expected float, got high"),
    ([*BASE, "--model.lr_schedule=cosin"], "model.lr_schedule: expected one of cosine, linear, constant, got cosin"),
    ([*BASE, "--model.lr_schedule="], "model.lr_schedule: expected one of cosine, linear, constant, got nothing"),
    ([*BASE, "--model.lr_schedule"], "model.lr_schedule: expected one of cosine, linear, constant, got nothing"),
    ([*BASE, "--model.sampling=null"], "model.sampling has settings of its own, and null is none; set model.sampling."),
    (
        [*BASE, "--config=bare.yaml"],
        "model.finetune has settings of its own, and null is none; set model.finetune.mode",
    ),
    ([*BASE, "--trainer.callbacks="], "trainer.callbacks: expected list, got nothing"),
    ([*BASE, "--trainer.max_steps="], "trainer.max_steps: expected int, got nothing"),
    ([*BASE, "--data.max_length="], "data.max_length: expected int, got nothing"),
    ([*BASE, "--model.optimizer="], "model.optimizer needs a value, or leave it out"),
    ([*BASE, "--config=guard.yaml"], "trainer.callbacks: MetricGuard needs metric; write it below init_args"),
    ([*BASE, "--config=trainer_bare.yaml"], "config 'trainer_bare.yaml': trainer holds nothing; write 'key: value'"),
    ([*BASE, "--config=init_bare.yaml"], "config 'init_bare.yaml': model.init_args holds nothing; write 'key: value'"),
    (
        [*BASE, "--trainer.logger=TensorBoard"],
        "trainer.logger: there is no class 'TensorBoard'; did you mean 'pytorch_lightning.loggers.TensorBoardLogger'?",
    ),
    ([*BASE, "--model.optimizer=null"], "model.optimizer: expected a class or function, got null"),
    ([*BASE, "--config=twice.yaml"], "config 'twice.yaml' line 2: 'trainer' stands there a second time"),
    ([*BASE, "--data.batch_size=0"], "batch_size (0) must be at least 1"),
    ([*BASE, "--data.data=missing.jsonl"], "missing.jsonl does not exist"),
    ([*BASE, "--data.data=columns.jsonl"], "columns.jsonl has columns note, label; needed: "),
    ([*BASE, "--data.data=empty.jsonl"], "empty.jsonl has no rows"),
    ([*BASE, "--data.data=broken.jsonl"], "broken.jsonl line 1: broken JSON"),
    ([*BASE, "--data.data=null.jsonl"], "null.jsonl line 2: prompt is null"),
    ([*BASE, "--data.data=messages.jsonl"], "messages.jsonl line 1: tokenizer lm has no chat template"),
    (
        [*BASE, "--data.max_length=4000"],
        "max_length (4000) is beyond the 96 positions of lm; pass --data.max_length 96",
    ),
    (
        [*PPO_RUN, "--model.reward=operator.eq", "--data.max_prompt_length=97"],
        "max_prompt_length (97) is beyond the 96 positions of lm; pass --data.max_prompt_length below 96",
    ),
    (
        ["prepare", "--tokenizer=lm", "--data=pairs.jsonl", "--out=x"],
        "max_length (512) is beyond the 96 positions of lm; pass --max_length 96",
    ),
    ([*BASE, "--model.model_name_or_path=./missing"], "model folder './missing' does not exist"),
    ([*BASE, "--model.model_name_or_path=empty_folder"], "'empty_folder' is not a model folder: it has no config.json"),
    ([*BASE, "--ckpt_path=missing.ckpt"], "--ckpt_path: 'missing.ckpt' does not exist"),
    ([*BASE, "--ckpt_path=last"], "--ckpt_path last: there is no checkpoint in 'run/checkpoints'"),
    ([*BASE, "--ckpt_path=bad.ckpt"], "--ckpt_path: 'bad.ckpt' is not a complete checkpoint"),
    ([*BASE, "--ckpt_path=other.ckpt"], "--ckpt_path: 'other.ckpt' is no Lightning checkpoint"),
    (
        [*BASE, "--trainer.accumulate_grad_batches=4"],
        "--trainer.accumulate_grad_batches 4: the stages accumulate by themselves; set --data.batch_size to the whole "
        "batch and --model.micro_batch_size to what fits in memory",
    ),
    ([*BASE, "--trainer.gradient_clip_val=1"], "--trainer.gradient_clip_val: the stages clip by themselves; set --mod"),
    ([*BASE, "--trainer.strategy=nope"], "--trainer: You selected an invalid strategy name: `strategy='nope'`."),
    ([*BASE, "--trainer.max_epochs=-5"], "--trainer: `max_epochs` must be a non-negative integer or -1."),
    ([*PPO_RUN, "--model.reward=lm"], "'lm' has no trained reward head (it is a LlamaForCausalLM)"),
    ([*PPO_RUN, "--model.reward=missing/folder/x"], "model folder 'missing/folder/x' does not exist"),
    (
        [*PPO_RUN, "--model.reward=operator.eq", "--data.data=missing.jsonl", "--model.value_name_or_path=missing/x/y"],
        "model folder 'missing/x/y' does not exist",
    ),
    ([*PPO_RUN, "--data.data=missing.jsonl", "--model.reward=operator.neg"], "reward function 'operator.neg' takes (a"),
    (
        [*PPO_RUN, "--data.data=missing.jsonl", "--model.reward=json.nofunction"],
        "reward function 'json.nofunction' not found",
    ),
    (
        [
            *PPO_RUN,
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.val_check_interval=20",
            "--model.reward=operator.eq",
        ],
        "--trainer: `val_check_interval` (20) must be less than or equal to the number of the training batches",
    ),
    ([*PPO_RUN, "--model.minibatch_size=3"], "rollout_batch_size (4) must be a multiple of minibatch_size (3)"),
    ([*PPO_RUN, "--model.kl.coef=-1"], "kl.coef (-1.0) must be at least 0"),
    ([*BASE, "--model.optimizer.lr=-1"], "model.optimizer: Invalid learning rate: -1.0"),
    ([*BASE, "--model.optimizer.lr=nan"], "model.optimizer.lr: expected float, got nan"),
    ([*BASE, "--data.num_workers=-1"], "num_workers (-1) must be at least 0"),
    ([*BASE, "--trainer.devices=99999"], "--trainer.devices 99999: without GPUs each is a process, and there are "),
    ([*BASE, "--trainer.devices=-5"], "--trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    (
        [*BASE, "--trainer.default_root_dir=/dev/null/run"],
        "--trainer.default_root_dir: '/dev/null/run' cannot be written (Not a directory); ",
    ),
    ([*BASE, f"--data.data={'x' * 5000}.jsonl"], f"{'x' * 300} ...: File name too long; check the path"),
    ([*BASE, f"--model.model_name_or_path=./{'x' * 5000}"], f"{'x' * 300} ...: File name too long; check the path"),
    (["fit", "--config", "circle.yaml"], "config 'circle.yaml': an alias stands for something that it is part of"),
    (
        ["predict", *REWARD, "--model.model_name_or_path=lm", "--data.predict_data=pairs.jsonl"],
        "'lm' has no trained reward head",
    ),
]


def refused(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(args)
    captured = capsys.readouterr()
    assert end.value.code == 2
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.err.splitlines()[-1:] == errors, captured.err
    assert "Traceback" not in captured.err
    return errors[0].removeprefix("error: ")


@pytest.mark.parametrize(("args", "message"), CASES, ids=[" ".join(args[-2:]) for args, _ in CASES])
def test_bad_input_gets_one_line_and_leaves_nothing(inputs, monkeypatch, capsys, args, message):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("sys.argv", ["rlhf"])
    before = sorted(inputs.rglob("*"))
    assert refused(capsys, args).startswith(message)
    assert sorted(inputs.rglob("*")) == before


FILE_IN_THE_WAY = [
    (["toy", "--out=file"], "--out file: '{file}' is a file"),
    (["toy", "--out=file/x"], "--out file/x: '{file}' is a file"),
    (["quickstart", "--out=file"], "--out file: '{file}' is a file"),
    (["quickstart", "--over_optimise", "--out=file"], "--out file: '{file}' is a file"),
    (["pipeline", "--config=pipe.yaml", "--out=file"], "--out file/sft: '{file}' is a file"),
    (["evaluate", "--models", "lm", "--data=pairs.jsonl", "--out=file"], "--out file: '{file}' is a file"),
    (
        ["evaluate", "--models", "lm", "--data=pairs.jsonl", "--out=made"],
        "--out made/evaluation.json: there is a folder",
    ),
    (["sample", *ANSWERS, "--out=file/rows.jsonl"], "--out file: '{file}' is a file"),
    (["sample", *ANSWERS, "--out=made"], "--out made: there is a folder"),
    (["sample", *ANSWERS, "--out=made/rows"], "--out made/rows: there is a folder 'made/rows.partial'"),
    ([*BASE, "--trainer.default_root_dir=file"], "--trainer.default_root_dir: 'file' cannot be written (File exists)"),
    (
        [*BASE, "--trainer.callbacks=[{class_path: rlhf_lightning.HFExport, init_args: {dirpath: file/x}}]"],
        "the export would go to {file}: '{file}' is a file",
    ),
    (
        ["predict", *BASE[1:-1], "--trainer.default_root_dir=file"],
        "--trainer.default_root_dir file: '{file}' is a file",
    ),
    (
        ["predict", *BASE[1:-1], "--trainer.default_root_dir=made"],
        "PredictionWriter: path made/predictions.jsonl: there is a folder of that name",
    ),
]


@pytest.mark.parametrize(
    ("args", "message"), FILE_IN_THE_WAY, ids=[" ".join(a[:1] + a[-1:]) for a, _ in FILE_IN_THE_WAY]
)
def test_what_lies_in_the_way_of_results_is_said_before_work_begins(inputs, monkeypatch, capsys, args, message):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("sys.argv", ["rlhf"])
    (inputs / "file").touch()
    for name in ("rows.partial", "evaluation.json", "predictions.jsonl"):
        (inputs / "made" / name).mkdir(parents=True, exist_ok=True)
    options = "{model: {model_name_or_path: lm}, data: {data: pairs.jsonl}}"
    (inputs / "pipe.yaml").write_text(f"steps:\n  sft:\n    config: sft.yaml\n    options: {options}\n")
    before = sorted(inputs.rglob("*"))
    assert refused(capsys, args).startswith(message.format(file=inputs / "file"))
    assert sorted(inputs.rglob("*")) == before


def test_a_run_folder_that_holds_an_earlier_run_is_refused_and_kept(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rlhf"])
    monkeypatch.chdir(inputs)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"precious")
    message = refused(capsys, [*BASE, f"--trainer.default_root_dir={tmp_path}"])
    assert message == (
        f"'{tmp_path}' holds an earlier run: resume it with --ckpt_path last, choose another "
        "--trainer.default_root_dir, or start anew in it with --overwrite true"
    )
    refused(capsys, [*BASE, f"--trainer.default_root_dir={tmp_path}", "--overwrite=true", "--data.data=missing.jsonl"])
    assert checkpoint.read_bytes() == b"precious"


def test_a_mistake_in_a_process_of_its_own_is_one_line_on_stderr(inputs):
    result = run("ift", cwd=inputs)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown command 'ift'; did you mean `rlhf fit`?\n"


def test_a_bad_option_in_a_process_of_its_own_is_one_line_on_stderr(inputs):
    result = run(*BASE, "--model.sampling.topk=3", cwd=inputs)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: unknown key 'model.sampling.topk': ")


def test_an_unforeseen_complaint_keeps_what_it_tells():
    assert (
        one_line('Parser key "model":\n  Subtypes: [a]\n  Errors:\n    - the moon is full') == "model: the moon is full"
    )
