"""config.py: one spelling in three places, and every mistake gets an answer."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import config
import configurator
import consistency
import manifest
from config import DATASET, LEARNED, MODEL, RUN, Config, ConfigError, Model, Optim, Stage, Train


def run(*arguments, **environment):
    import os

    command = [sys.executable, str(ROOT / "config.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd="/")


def test_a_table_of_configs_is_asked_by_entry_and_says_what_it_has():
    assert config.load("pythia-160m") == config.load("configs/pythia-160m.py")
    assert config.load("pythia-160m").model.d_model == 768
    with pytest.raises(ConfigError, match="several configs; use pythia-14m or pythia-31m"):
        config.load("pythia")
    with pytest.raises(ConfigError, match="has no 'pythia-161m'; use pythia-14m or"):
        config.load("pythia-161m")


def test_init_from_is_spelled_with_either_dash():
    assert (
        config.load("demo", ["--init-from=x"]).init_from
        == config.load("demo", ["--init_from=x"]).init_from
        == "x"
    )


def test_three_names_mean_the_same_file():
    names = ("demo", "configs/demo.py", "config/demo.py", "configs/demo", str(ROOT / "configs" / "demo.py"))
    assert len({str(configurator.find(name)[0].resolve()) for name in names}) == 1


def test_an_override_is_spelled_like_the_setting_and_typed():
    cfg = config.load(
        "demo", ["--optim.lr=5e-4", "--train.steps=1e2", "--model.tie_embeddings=true", "--run=/x y"]
    )
    assert (cfg.optim.lr, cfg.train.steps, cfg.model.tie_embeddings, cfg.run) == (5e-4, 100, True, "/x y")
    assert type(cfg.train.steps) is int


def test_overrides_are_applied_together_before_a_section_is_checked():
    # n_heads=5 alone does not divide the demo's d_model of 128, and is not divided by its 2 kv heads
    cfg = config.load("demo", ["--model.d_model=100", "--model.n_heads=5", "--model.n_kv_heads=5"])
    assert cfg.model.d_head == 20


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--optim.lrr=1", "did you mean 'optim.lr'"),
        ("--train.steps=1.5", "a whole number"),
        ("--train.steps=nan", "a whole number"),
        ("--optim.lr=fast", "a number"),
        ("--optim.lr=nan", "above 0"),
        ("--optim.lr=-1", "above 0"),
        ("--model.norm=rms", "'rmsnorm' or 'layernorm' or 'nonparametric_layernorm'"),
        ("--model.tie_embeddings=yes", "true or false"),
        ("--model.n_kv_heads=3", "use one of [1, 2, 4]"),
        ("--model.d_head=33", "use an even number"),
        ("--model.rope_fraction=0.3", "rotary dimensions, and they form pairs"),
        ("--model.init=mup", "muP needs both"),
        ("--model.n_layers=0", "at least 1"),
        ("--eval.prompt_tokens=250", "do not fit"),
        ("--data.validation_fraction=1", "must be below 1"),
        ("--data.max_bad_fraction=-0.1", "must be at least 0"),
        ("--optim.beta2=1", "optim.beta2=1.0 must be below 1"),
        ("--optim.final_lr_fraction=1.1", "must be at most 1"),
        ("--data.sources=x", "set it in the config file"),
        ("--lr=1", "did you mean 'optim.lr'?"),
        ("--optim.learning_rate=1", "did you mean 'optim.lr'?"),
        ("--learnig-rate=1", "did you mean 'optim.lr'?"),
        ("--batch-size=1", "did you mean 'train.batch_size' or 'eval.batch_size'?"),
        ("--steps=1", "did you mean 'train.steps'?"),
        ("--max_steps=1", "did you mean 'train.steps'?"),
        ("--model.layers=1", "did you mean 'model.n_layers'?"),
        ("--n_layer=1", "did you mean 'model.n_layers'?"),
        ("--hidden_size=1", "did you mean 'model.d_model'?"),
        ("--optim.lr=inf", "must be a number above 0"),
        ("--optim.lr=1e400", "must be a number above 0"),
        ("--optim.weight_decay=inf", "must be a finite number"),
        ("--model.rope_scaling_high=nan", "must be a finite number"),
        ("--train.batch_size_max=99999999999999999999", "does not fit into 64 bits"),
        ("--train.seed=9223372036854775808", "does not fit into 64 bits"),
        ("--train.steps=1e400", "a whole number"),
        ("--model.init_std=0", "such a model learns nothing"),
        ("--model.init_std=-0.0", "such a model learns nothing"),
        ("--run=", "--run= is empty"),
        ("--dataset=", "--dataset= is empty"),
        ("--run=" + "x" * 300, "up to 255 bytes"),
        ("--run=/etc/passwd/x", "is a file, not a folder"),
        ("optim.lr=1", "give exactly one config"),
        ("--optim.lr", "not an override"),
        ("--optim.warmup_tokens=9", "optim.schedule_tokens, too"),
        ("--optim.schedule_tokens=1e6", "counts tokens and optim.warmup_steps=40 counts steps"),
        (
            "--optim.muon_momentum=0.9 --optim.optimizer=adamw",
            "would have no effect: it needs optim.optimizer=muon",
        ),
        ("--optim.decay_fraction=0.2", "it needs optim.schedule=constant"),
        ("--optim.grad_clip_start_steps=5", "it needs optim.grad_clip_start_factor"),
        ("--train.rollback_steps=5", "it needs train.on_incident=rollback"),
        ("--train.max_incidents=5", "it needs train.on_incident=skip, defer or rollback"),
        ("--train.spike_window=5", "it needs train.spike_z above 0"),
        ("--parallel.reshard=false", "it needs parallel.strategy=fsdp"),
        ("--model.rope_scaling_low=2", "it needs model.rope_scaling above 1"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2_and_no_traceback(override, expected):
    result = run("demo", *override.split())
    assert result.returncode == 2 and result.stdout == ""
    assert expected in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from config import *\nconfig = Config(optim=Optim(lrr=1))", "did you mean 'lr'"),
        (
            "from config import *\nconfig = Config(optim=Optim(lr='1'))",
            "optim.lr='1' is a str; it must be float",
        ),
        ("from config import *\nconfig = Config(model=Model(n_heads=True))", "is a bool; it must be int"),
        ("from config import *\nconfig = Config(model=Optim())", "it must be Model"),
        ("from config import *\nconfig = Config(optim=Optim(learning_rate=1.0))", "did you mean 'lr'"),
        ("from config import *\nconfig = Config(name='a/b')", "becomes the name of folders"),
        ("from config import *\nconfig = Config(optim=Optim(lr=10**400))", "does not fit into 64 bits"),
        (
            "from config import *\nconfig = Config(eval=Eval(expect_bits_per_byte={'a': float('nan')}))",
            "eval.expect_bits_per_byte['a']=nan must be a finite number",
        ),
        ("x = 1\nconfig = 1 / 0", "line 2: ZeroDivisionError"),
        ("config = Config(", "SyntaxError"),
        ("cfg = 1", "must end in `config = Config(...)`"),
        ("raise SystemExit", "SystemExit"),
        (
            "from config import *\nconfig = Config(data=Data(stages=(Stage(epochs={'cod': 1}),), "
            "sources=(Source('code', paths=('.',)),)))",
            "did you mean 'code'",
        ),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, expected):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(str(path))
    assert expected in str(error.value) and str(path) in str(error.value)


def test_a_config_that_does_not_exist_gets_a_suggestion():
    assert "did you mean 'demo'" in run("dmeo").stderr


def test_under_torchrun_a_mistake_is_told_once():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    result = subprocess.run([*command, ROOT / "config.py", "demo", "--x=1"], capture_output=True, text=True)
    assert result.returncode != 0 and result.stderr.count("error: --x") == 1


def test_help_lists_every_setting_with_its_comment():
    text = run("--help").stdout
    for setting in config.SETTINGS:
        assert f"--{setting}=" in text, setting
    assert "--optim.beta2=0.95" in text and "decay of the running mean of their squares" in text


def test_help_takes_defaults_and_comments_from_the_source_however_they_are_written():
    text = run("--help").stdout
    assert re.search(
        r"--train.on_incident=stop +after an incident: .*GLM-130B\) \[stop \| skip \| defer", text
    )
    assert re.search(r"--data.stages=\.\.\. +set in the config file\n", text)
    assert re.search(r"--tokenizer.path=\.\.\. +folder or file", text)
    assert re.search(r"\n    epochs=\.\.\. +passes over each source", text)
    for line in text.partition("\nA config of your own")[0].splitlines():
        assert not re.fullmatch(r" +-*[a-z_.]+=\S*( \[.*\])? *", line), f"no comment: {line}"


def test_help_and_errors_take_less_than_a_second_and_no_torch():
    began = time.perf_counter()
    run("demo", "--optim.lrr=1")
    assert time.perf_counter() - began < 1
    code = "import sys, config; config.load('demo'); assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_print_config_shows_resolved_values_and_runs_nothing(tmp_path):
    result = run("demo", "--print-config", "--optim.lr=0.25")
    assert result.returncode == 0
    assert "optim.lr = 0.25\n" in result.stdout and "run = 'runs/demo'\n" in result.stdout
    assert "model.d_head = 32\n" in result.stdout


def test_a_loaded_config_cannot_be_edited():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load("demo").optim.lr = 1.0


def test_an_integer_is_welcome_as_a_float_and_saved_as_one():
    assert Optim(lr=1) == Optim(lr=1.0) and type(Optim(lr=1).lr) is float


def test_deriving_one_config_from_another_derives_again():
    wide = dataclasses.replace(Config(model=Model(d_model=64, n_heads=4)), model=Model(d_model=96, n_heads=4))
    assert wide.resolved().model.d_head == 24


def test_a_stage_has_epochs_or_weights_with_tokens():
    for bad in (
        dict(name="../up"),
        dict(epochs={"a": 1.0}, weights={"a": 1.0}),
        dict(weights={"a": 1.0}),
        dict(tokens=5),
    ):
        with pytest.raises(ConfigError):
            Stage(**bad)


def test_a_schedule_counts_steps_or_tokens_and_its_warm_up_too():
    with pytest.raises(ConfigError, match="contradict each other"):
        Optim(schedule_steps=300, schedule_tokens=10**6, warmup_steps=0)
    with pytest.raises(ConfigError, match="counts steps"):
        Optim(schedule_tokens=10**6, warmup_tokens=1000, warmup_steps=30)
    assert Optim(schedule_tokens=10**6, warmup_tokens=1000).warmup == 1000  # the default is no contradiction
    assert Optim(schedule_tokens=10**6, warmup_steps=0).warmup == 0
    assert Optim(schedule_steps=300, warmup_steps=30).warmup == 30


def test_settings_that_nothing_reads_are_refused_but_not_what_an_override_leaves_behind(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from config import *\nconfig = Config(optim=Optim(schedule='constant', decay_fraction=0.2), "
        "model=Model(init='small_wang'), parallel=Parallel(strategy='fsdp', reshard=False))"
    )
    assert config.load(str(path)).optim.decay_fraction == 0.2
    # the file's decay_fraction and reshard mean nothing now, and nobody has asked for them here
    left = config.load(str(path), ["--optim.schedule=cosine", "--parallel.strategy=ddp"])
    assert left.optim.decay_fraction == 0.2 and not left.parallel.reshard
    config.load(str(path), ["--model.init_std=0.02", "--optim.muon_momentum=0.95"])  # as by default
    with pytest.raises(ConfigError, match=r"model\.init_std=0\.3 would have no effect: it needs"):
        config.load(str(path), ["--model.init_std=0.3"])
    with pytest.raises(ConfigError, match=r"optim\.decay_fraction=0\.3 would have no effect"):
        config.load(str(path), ["--optim.schedule=cosine", "--optim.decay_fraction=0.3"])
    path.write_text("from config import *\nconfig = Config(model=Model(positions='alibi', rope_theta=5e5))")
    with pytest.raises(ConfigError, match=r"mine\.py: model\.rope_theta=500000\.0 would have no effect"):
        config.load(str(path))


def test_every_setting_named_as_without_effect_exists():
    nothing = Config(
        model=Model(positions="none", init="small_wang"),
        optim=Optim(warmup_steps=0, grad_clip=0, schedule="constant", decay_fraction=0),
    )
    named = consistency.without_effect(nothing) | consistency.without_effect(Config())
    assert set(named) <= set(config.SETTINGS) and len(named) > 15


# ---- what a setting is for --------------------------------------------------------------------------------

# These lists are what resuming, rebuilding and --init_from go by. Who changes one changes what old runs,
# datasets and models may be used for.
IN_THE_DATASET = """
    model.seq_len tokenizer.path tokenizer.kind tokenizer.vocab_size tokenizer.split tokenizer.eot
    tokenizer.special_tokens data.sources data.stages data.n_chunks data.validation_fraction data.seed
    data.validation_seed train.batch_size
"""
IN_THE_WEIGHTS = """
    model.vocab_size model.d_model model.n_layers model.n_heads model.n_kv_heads model.d_head model.d_ff
    model.ffn model.norm model.norm_eps model.norm_place model.qk_norm model.clip_qkv model.bias
    model.parallel_residual model.positions model.rope_theta model.rope_fraction model.rope_pairs
    model.rope_scaling model.rope_scaling_low model.rope_scaling_high model.rope_scaling_seq_len model.window
    model.tie_embeddings model.embedding_multiplier model.logits_multiplier model.mup_base_width
"""
MAY_CHANGE_ON_RESUME = """
    tokenizer.path tokenizer.kind tokenizer.vocab_size tokenizer.split tokenizer.eot tokenizer.special_tokens
    data.workers data.max_bad_fraction data.expected_tokens
    train.micro_batch_size train.steps train.device train.attention train.compile
    train.activation_checkpointing
    train.deterministic train.log_every train.checkpoint_chunks train.checkpoint_every
    train.checkpoint_powers_of_two train.keep_others train.save_async train.verify train.spike_z
    train.spike_window train.on_incident train.rollback_steps train.rollback_skip train.max_incidents
    parallel.strategy parallel.shard parallel.reshard parallel.tp parallel.timeout_seconds
    eval.batch_size eval.max_rows eval.prompt_tokens eval.continuation_tokens eval.rows_per_chunk
    eval.generate_batch_size eval.seed eval.expect_bits_per_byte
    name run dataset
"""


def test_activation_checkpointing_is_a_number_or_a_word(tmp_path):
    name = "train.activation_checkpointing"
    for text, value in (("0", 0), ("2", 2), ("1e1", 10), ("selective", "selective"), ("auto", "auto")):
        cfg = config.load("7b", [f"--{name}={text}"])
        assert cfg.train.activation_checkpointing == value
        assert (
            configurator.from_dict(Config, config.to_dict(cfg)) == cfg
        )  # config.json of a run, also of earlier ones
    for text, message in (
        ("selectiv", "=selectiv: use 'auto' or 'selective' or int"),
        ("1.5", "=1.5: use 'auto' or 'selective' or int"),
        ("-1", "=-1 must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=f"{name}{message}"):
            config.load("7b", [f"--{name}={text}"])
    for value, message in (
        ("always", "'always' is no choice"),
        (True, "True is a bool"),
        (1.0, "1.0 is a float"),
    ):
        with pytest.raises(ConfigError, match=f"{name}={message}; it must be 'auto' or 'selective' or int"):
            Train(activation_checkpointing=value)
    (line,) = [line for line in config.settings_help().splitlines() if f"--{name}=" in line]
    assert f"--{name}=0 " in line and line.endswith(" [auto | selective | N]")


def test_every_setting_says_what_it_is_for():
    for name, f in configurator.fields_of(Config).items():
        assert isinstance(f.metadata.get("purpose"), config.Purpose) and f.metadata["purpose"], name
        assert (RUN in f.metadata["purpose"]) == (f.metadata["purpose"] == RUN), f"{name}: RUN is only RUN"


def test_the_purposes_of_settings_are_these():
    assert config.settings_for(DATASET) == IN_THE_DATASET.split()
    assert config.settings_for(MODEL) == IN_THE_WEIGHTS.split()
    every = [*config.SETTINGS, "name"]
    assert sorted(set(every) - set(config.settings_for(LEARNED))) == sorted(MAY_CHANGE_ON_RESUME.split())
    # the tokenizer may change because its hash is part of the dataset, and that may not
    free = [name for name in MAY_CHANGE_ON_RESUME.split() if not name.startswith("tokenizer.")]
    assert sorted(config.settings_for(RUN)) == sorted(free)


def test_a_dataset_records_its_settings_in_the_order_of_every_manifest():
    names = [name for name in IN_THE_DATASET.split() if name != "train.batch_size"]
    recorded = manifest.settings(config.load("demo"))
    assert list(recorded) == ["model.seq_len", "train.batch_size", *names[1:]]
    assert recorded["tokenizer.special_tokens"] == [] and recorded["data.sources"][0]["name"] == "code"


# ---- settings under a new name ----------------------------------------------------------------------------


def test_a_setting_under_its_old_name_still_loads_with_a_note(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "from config import *\nconfig = Config(model=Model(vocab_size=9, d_model=8, n_heads=2, init_cut=3), "
        "train=Train(on_spike='skip'))"
    )
    result = run(str(path), "--print-config")
    assert "model.init_trunc = 3.0\n" in result.stdout and "train.on_incident = 'skip'\n" in result.stdout
    assert sorted(result.stderr.splitlines()) == [
        "note: model.init_cut is now called model.init_trunc",
        "note: train.on_spike is now called train.on_incident",
    ]
    result = run("demo", "--train.on-spike=rollback", "--train.rollback_steps=7", "--print-config")
    assert "train.on_incident = 'rollback'\n" in result.stdout
    assert result.stderr == "note: train.on_spike is now called train.on_incident\n"
    assert run("demo", "--print-config").stderr == ""


def test_a_mistake_in_a_setting_under_its_old_name_names_the_new_one():
    result = run("demo", "--train.on_spike=jump")
    assert result.returncode == 2 and "--train.on_incident=jump: use 'stop' or 'skip'" in result.stderr
    with pytest.raises(ConfigError, match=r"train\.on_incident was called train\.on_spike: set it once"):
        Train(on_spike="skip", on_incident="stop")


def test_a_run_with_settings_under_old_names_is_the_same_run(tmp_path):
    cfg = config.load("olmo2-1b", ["--train.on_incident=defer", f"--run={tmp_path}"])
    values = config.to_dict(cfg)
    values["model"]["init_cut"] = values["model"].pop("init_trunc")
    values["train"]["on_spike"] = values["train"].pop("on_incident")
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    assert config.load_run(tmp_path) == cfg and cfg.model.init_trunc == 3


def test_names_that_settings_had_are_not_used_for_others():
    for old, new in config.RENAMED.items():
        assert old not in config.SETTINGS and new in config.SETTINGS


# ---- processes --------------------------------------------------------------------------------------------


def test_accumulation_follows_from_the_global_batch_and_errors_name_sizes_that_work():
    assert consistency.accumulation_steps(2240, 10, 224) == 1  # Amber
    assert consistency.accumulation_steps(12, 2, 3) == 2
    with pytest.raises(ConfigError) as error:
        consistency.accumulation_steps(100, 8, 3)
    assert "use train.batch_size=96 or 120" in str(error.value)
    with pytest.raises(ConfigError) as error:
        consistency.accumulation_steps(90, 4, 3)
    assert "train.micro_batch_size=3 or 5" in str(error.value)


def test_a_file_in_place_of_a_run_folder_is_an_error_not_a_traceback(tmp_path):
    (tmp_path / "a.py").write_text("")
    for path in (tmp_path / "a.py", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="not a run folder"):
            config.load_run(path)


def test_train_answers_a_mistake_before_it_imports_torch():
    began = time.perf_counter()
    command = [sys.executable, ROOT / "train.py", "demo", "--optim.lrr=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "did you mean" in result.stderr
    assert time.perf_counter() - began < 1


def test_a_negative_zero_is_zero():
    assert str(Optim(weight_decay=-0.0).weight_decay) == "0.0"


def test_the_largest_seeds_are_those_that_torch_takes():
    import torch

    for seed in (2**63 - 1, -(2**63) + 1):
        cfg = config.load("demo", [f"--train.seed={seed}"])
        torch.Generator().manual_seed(cfg.train.seed)


def test_advice_names_the_command_that_works_for_how_the_config_was_given(recipe, tmp_path):
    """data.py and train.py say what to run first, from another folder, and that command runs unchanged."""
    (tmp_path / "text").mkdir()
    for path in sorted((recipe.parent / "text").iterdir()):
        (tmp_path / "text" / path.name).write_text(path.read_text())
    text = recipe.read_text().replace(str(recipe.parent / "tokenizer"), "tok")
    text = text.replace(str(recipe.parent / "dataset"), "").replace(str(recipe.parent / "text"), "text")
    (tmp_path / "a config.py").write_text(text)

    def python(*command):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)

    given = ("a config.py", "--model.seq_len=32", "--run=the run")
    for script, before in (("data.py", "tokenizer.py train"), ("train.py", "data.py")):
        failed = python(ROOT / script, *given)
        assert failed.returncode == 2, failed.stderr
        advice = shlex.split(failed.stderr.partition(" it: ")[2])
        assert advice[:2] == ["python", str(ROOT / before.partition(" ")[0])] and before in " ".join(advice)
        done = python(*advice[1:])
        assert done.returncode == 0, done.stderr
    assert python(ROOT / "train.py", *given, "--train.steps=1").returncode == 0


def test_a_published_tokenizer_that_is_missing_is_put_there_not_trained():
    for command in (["data.py", "7b"], ["tokenizer.py", "train", "7b"]):
        said = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
        assert said.returncode == 2 and "--tokenizer.path=FILE" in said.stderr
        assert "tokenizer.py train" not in said.stderr
