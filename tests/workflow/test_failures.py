"""What a failed run ends with: the log of each job that failed for good, and the end of it."""

from mistral_prune_lora.workflow.failures import failed_logs, failures

# In the words of Snakemake 9.
LOG = """\
Error in rule importance:
    message: SLURM-job '11' failed
    jobid: 29
    input: dense/config.json
    log: logs/importance.log, slurm_logs/11.log (check log file(s) for error details)
    external_jobid: 11
Trying to restart job 29.
Finished jobid: 11 (Rule: teacher_states)
Error in rule merge_A:
    message: None
    jobid: 3
    log: logs/merge_A.log (check log file(s) for error details)
Error in rule segment:
    jobid: 4
    log: logs/segment.log (check log file(s) for error details)
"""


def test_of_each_job_that_failed_for_good_the_last_lines_of_its_log_are_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.log").write_text(LOG)
    assert list(failed_logs(["run.log"])) == ["29", "3", "4"]
    (tmp_path / "run.log").write_text(LOG + "Finished jobid: 3 (Rule: merge_A)\n")
    for folder in ("logs", "slurm_logs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "logs/importance.log").write_text("\n")
    (tmp_path / "slurm_logs/11.log").write_text("one\n\ntwo\nth\x1bree\n")
    assert list(failures(["run.log"], 2)) == [
        "importance failed; its log slurm_logs/11.log ends with:",
        "    two",
        "    th\\x1bree",
        "segment failed and wrote nothing to logs/segment.log",
    ]


def test_a_run_ends_with_them(project):
    (project.folder / "corpus.txt").write_text("too short")
    printed = project.snakemake("--until", "windows", succeeds=False)
    told, said = printed.split("windows failed; its log ")[1].split(" ends with:\n")
    assert said.splitlines()[0].startswith("    device cpu") and "less than one window" in said
    assert (project.folder / told).read_text().splitlines()[-1].strip() in said
