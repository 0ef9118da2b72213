"""A gcloud that has no cloud: it writes down how it was called and answers as a test has scripted.

In the folder FAKE_GCLOUD: calls.jsonl gets one argument list per line; rules.json holds a list of rules, and the first
whose regular expression `match` is found in the joined arguments answers with stdout, stderr and rc, after `sleep`
seconds, `times` times. --command strings that no rule answers are executed in FAKE_GCLOUD/home, as ssh would.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

folder = Path(os.environ["FAKE_GCLOUD"])
arguments = sys.argv[1:]
with (folder / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
rules = json.loads((folder / "rules.json").read_text())
for rule in rules:
    if re.search(rule["match"], " ".join(arguments), re.DOTALL) and rule.get("times", 1) > 0:
        if "times" in rule:
            rule["times"] -= 1
            (folder / "rules.json").write_text(json.dumps(rules))
        time.sleep(rule.get("sleep", 0))
        sys.stdout.write(rule.get("stdout", ""))
        sys.stderr.write(rule.get("stderr", ""))
        sys.exit(rule.get("rc", 0))

home = folder / "home"
command = next((word.removeprefix("--command=") for word in arguments if word.startswith("--command=")), None)
if command is not None:
    sys.exit(subprocess.run(["sh", "-c", command], cwd=home, env={**os.environ, "HOME": str(home)}).returncode)
if "scp" in arguments and ":" in arguments[arguments.index("scp") + 2]:
    source, target = arguments[arguments.index("scp") + 1 :][:2]
    (home / target.partition(":")[2]).write_bytes(Path(source).read_bytes())
    sys.exit(0)
if "describe" in arguments:
    sys.stderr.write(f"ERROR: ({'.'.join(['gcloud', *arguments[:4]])}) NOT_FOUND: Resource was not found\n")
    sys.exit(1)
if "list" in arguments:
    print("[]")
