"""Run `snakemake --lint` and fail on anything but one advice: an environment for every rule.

The environment is one for the whole project, .venv from requirements.lock.
"""

import subprocess
import sys

ACCEPTED = "Specify a conda environment or container for each rule."


def main() -> int:
    run = subprocess.run(["snakemake", "--lint"], capture_output=True, text=True)
    text = run.stdout + run.stderr
    titles = [line.strip() for line in text.splitlines() if line.strip().startswith("* ")]
    problems = [title for title in titles if ACCEPTED not in title]
    if problems or (run.returncode and not titles):
        print(text)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
