"""The batch script of an experiment."""

import argparse
import inspect
import signal
import subprocess
import time

import pytest

from eagle_train.resources import resource_dir
from eagle_train.tools import plan
from eagle_train.tools.sbatch import SCRIPT_OPTIONS, add_arguments, check, with_directive
from eagle_train.train import app

ASKED = ["+experiment=toy", "engine=zero3", "name=my toy", "data.num_workers=6"]


@pytest.fixture
def render(capsys, monkeypatch, tmp_path):
    """Returns the script for options, on a machine without SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(*options):
        assert plan.main([*ASKED, "--sbatch", *options]) == 0
        printed = capsys.readouterr()
        assert "not checked: there is no `sbatch`" in printed.err
        return printed.out

    return make


def directives(script):
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def test_an_experiment_is_filled_in(render):
    script = render("--nodes=4", "--gpus-per-node=2", "--time=2:00:00", "--partition=big", "--venv=/a b")
    found = directives(script)
    assert (
        found
        | {
            "job-name": "my-toy",
            "nodes": "4",
            "ntasks-per-node": "2",
            "gpus-per-node": "2",
            "cpus-per-task": "8",
            "time": "2:00:00",
            "signal": "USR1@600",
            "partition": "big",
            "requeue": "",
            "open-mode": "append",
            "exclusive": "",
        }
        == found
    )
    assert "account" not in found
    assert "\nVENV='/a b'\n" in script


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes", "4", "--gpus-per-node=2"], "--nodes, --gpus-per-node: for --sbatch alone"),
        (["--time=1:00:00", "--venv=/a"], "--time, --venv: for --sbatch alone"),
        (["--sbatch", "--json", "--ranks=7", "--activations"], "--json, --ranks, --activations: not with --sbatch"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(["+experiment=toy", *options])
    assert said in capsys.readouterr().err


def test_every_option_of_the_script_is_known_to_be_one():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert {*vars(parser.parse_args([]))} == {"sbatch", *SCRIPT_OPTIONS}


def test_without_gpus_there_is_one_rank_per_node_and_nodes_are_shared(render):
    found = directives(render("--gpus-per-node=0"))
    assert found["ntasks-per-node"] == "1"
    assert not {"gpus-per-node", "mem", "exclusive"} & set(found)


def test_the_script_runs_the_overrides_with_the_python_that_is_named(render, tmp_path):
    script = render(f"--venv={tmp_path}")
    lines = script.splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(text)) for text in ("set -u", "step="))
    body = "\n".join(lines[start:end])
    told = "srun() { printf '%s\\n' \"$@\"; }; squeue() { echo 7 1795876521; }\nSLURM_JOB_NAME=x SLURM_JOB_ID=7\n"
    told += "SLURM_JOB_END_TIME=1\n"  # of the job that it was submitted from
    told += f"SLURM_JOB_NODELIST=n1 LOGS={tmp_path}/logs\nSLURM_CPUS_PER_TASK=8\nPATH=/usr/bin:/bin\n"
    told += "export SLURM_EXPORT_ENV=NONE\n"
    shown = "wait; echo $SRUN_CPUS_PER_TASK $SLURM_JOB_END_TIME ${SLURM_EXPORT_ENV-everything}\n"
    bash = ["/bin/bash", "-c", f"{told}{body}\n{shown}", "job", "seed=3"]
    done = subprocess.run(bash, capture_output=True, text=True, check=True, cwd=tmp_path)
    said = done.stdout.splitlines()
    assert said[-9:-1] == [f"{tmp_path}/bin/python", "-m", "eagle_train", *ASKED, "seed=3"]
    assert "--kill-on-bad-exit=1" in said
    assert said[-1] == "8 1795876521 everything"
    assert (tmp_path / "logs" / "x-7" / "start-0").is_dir()


def test_places_of_python_that_contradict_each_other_are_refused(capsys):
    with pytest.raises(ValueError, match="give one of them"):
        plan.main([*ASKED, "--sbatch", "--venv=a", "--container=b"])


def test_what_the_scheduler_refuses_ends_with_its_words(tmp_path):
    refuses = tmp_path / "sbatch"
    refuses.write_text("#!/bin/sh\ncat >/dev/null\necho 'sbatch: error: too many nodes' >&2\nexit 1\n")
    refuses.chmod(0o755)
    assert check("#!/bin/bash\n", [str(refuses)]) == ("sbatch: error: too many nodes", False)


def test_a_directive_is_set_added_or_left_out():
    script = "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --requeue\necho\n"
    assert with_directive(script, "nodes", "3") == script.replace("=1", "=3")
    assert with_directive(script, "nodes", None) == script.replace("#SBATCH --nodes=1\n", "")
    assert with_directive(script, "qos", "high") == script.replace("requeue\n", "requeue\n#SBATCH --qos=high\n")


def test_the_template_is_a_valid_script_that_takes_its_arguments_as_overrides():
    path = resource_dir("slurm") / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert 'arguments=("$@")' in path.read_text()


@pytest.fixture
def job(tmp_path):
    """Returns what starts the template once: from a checkpoint, ending with a code; and whether it was requeued."""
    requeues, starts = tmp_path / "requeues", []
    srun = """for word in "$@"; do [ "${word#--output=}" = "$word" ] || log=${word#--output=}; done
    echo "12:00:00 WARNING $RESUMED" >"${log%rank-%t.log}rank-0.log"; exit $CODE"""
    programs(tmp_path, srun=srun, squeue='echo "7 RUNNING 7"', scontrol=f'echo "$@" >>{requeues}')

    def start(code, resumed):
        starts.append(code)
        done = run_script(tmp_path, RESUMED=resumed, CODE=str(code), SLURM_RESTART_COUNT=str(len(starts)))
        assert done.returncode == code and not done.stderr, done
        said = requeues.read_text() if requeues.exists() else ""
        requeues.unlink(missing_ok=True)
        assert said in ("", "requeue 7\n")
        return bool(said), done.stdout

    return start


def programs(folder, **programs):
    """Writes shell scripts in the place of programs."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, does in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / "bin" / name).chmod(0o755)


def begin_script(folder, **variables):
    """Starts the template with the programs in a folder."""
    env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "7", "LOGS": f"{folder}/logs"}
    script, pipe = resource_dir("slurm") / "train.sbatch", subprocess.PIPE
    env |= {"SLURM_JOB_NODELIST": "n1"} | variables
    return subprocess.Popen(["bash", str(script)], env=env, stdout=pipe, stderr=pipe, text=True)


def run_script(folder, **variables):
    """Runs the template with the programs in a folder to its end."""
    with begin_script(folder, **variables) as process:
        out, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def resumed(step):
    """Returns what a run says when it resumes; the script compares it from start to start."""
    message = "resuming stage %s at step %d from %s"
    assert f'"{message}"' in inspect.getsource(app)
    return message % ("sft", step, f"/run/checkpoints/step-{step:08d}")


def test_a_job_that_gets_no_further_is_not_requeued_for_ever(job):
    assert [job(1, resumed(20))[0] for _ in range(2)] == [True, True]
    again, said = job(137, resumed(20))
    assert not again and "three failures in a row without a new checkpoint" in said and resumed(20) in said


def test_failures_between_which_there_is_progress_or_a_good_end_are_borne(job):
    assert all(job(1, resumed(step))[0] for step in (20, 20, 30, 30, 40))
    assert all(job(code, "no checkpoint yet")[0] for code in (1, 1, 75, 1, 1, 75))
    assert job(0, resumed(50))[0] is False


def test_one_task_of_an_array_is_requeued_and_not_the_array_whose_number_it_has(tmp_path):
    states = "8 PENDING 7_2\\n7 RUNNING 7_3\\n71 RUNNING 7_4\\n"
    lists = f'case "$*" in *%e*) printf "8 1\\n7 22\\n9 3\\n";; *) printf "{states}";; esac'
    asked = f'echo "$@" >>{tmp_path}/asked'
    programs(tmp_path, srun=f"echo $SLURM_JOB_END_TIME >{tmp_path}/end; exit 75", squeue=lists, scontrol=asked)
    assert run_script(tmp_path).returncode == 75
    assert (tmp_path / "asked").read_text() == "requeue 7_3\n"
    assert (tmp_path / "end").read_text() == "22\n"


def test_a_controller_that_is_away_for_a_while_is_asked_again(tmp_path):
    away = f"""echo >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -lt 4 ] && exit 1; echo 7 RUNNING 7"""
    does = f'echo "$0 $@" | sed "s,.*/,," >>{tmp_path}/did'
    programs(tmp_path, srun="exit 75", squeue=away, sleep=does, scontrol=does)
    assert run_script(tmp_path).returncode == 75
    assert (tmp_path / "did").read_text() == "sleep 10\nsleep 10\nscontrol requeue 7\n"


@pytest.mark.parametrize("ends", ["at once", "later"])
def test_a_signal_to_the_script_alone_is_given_to_the_ranks_and_its_end_waited_for(tmp_path, ends):
    does = f'echo "$@" >>{tmp_path}/asked'
    later = "exit 75" if ends == "at once" else "touch told"
    rank = f"""trap '{later}' USR1; cd {tmp_path}; touch ready
    for i in $(seq 1200); do [ -e told ] && [ -e go ] && exit 75; sleep 0.05; done"""
    programs(tmp_path, srun=rank, squeue="echo 7 RUNNING 7", scontrol=does)
    with begin_script(tmp_path) as job:
        until(lambda: (tmp_path / "ready").exists())
        job.send_signal(signal.SIGUSR1)
        if ends == "later":
            until(lambda: (tmp_path / "told").exists() or job.poll() is not None)
            (tmp_path / "go").touch()
        out, _ = job.communicate(timeout=60)
    assert job.returncode == 75 and "ended with 75" in out
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def until(true):
    """Waits for something to be so."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_name_with_spaces_is_one_word_to_sbatch(render):
    script = render("--job-name=my toy", "--account=a b")
    assert directives(script)["job-name"] == "'my toy'" and directives(script)["account"] == "'a b'"
