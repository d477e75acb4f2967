"""Known vulnerabilities of the installed packages, by pip-audit; a part of `make lint`.

Prints what it finds, and with `--strict` exits with 1 when there is any: by default an advisory that was published today does
not fail a checkout that passed yesterday. Where pip-audit is not installed, or the index with the advisories does not answer,
one line says that nothing was audited.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

QUICK, LONG = "5", 120
"""Seconds that one answer, and all of them, may take."""


def main() -> int:
    """Returns the exit code."""
    if importlib.util.find_spec("pip_audit") is None:
        return skipped("pip-audit is not installed")
    options = ["--progress-spinner=off", "--skip-editable", "--local", "--format=json", "--timeout", QUICK]
    command = [sys.executable, "-m", "pip_audit", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return skipped(f"the index has not answered in {LONG} seconds")
    except (ValueError, KeyError):
        return skipped((done.stderr.strip().splitlines() or ["pip-audit says nothing"])[-1])
    known = [package for package in packages if "skip_reason" not in package]
    for package in known:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {found['id']}, mended in {fixed}")
    if not known:
        return skipped(f"the index knows none of {len(packages)} packages")
    bad, unknown = sum(bool(package["vulns"]) for package in known), len(packages) - len(known)
    print(f"audit: {bad} of {len(known)} packages with known vulnerabilities; {unknown} unknown to the index")
    return int(bad > 0 and "--strict" in sys.argv[1:])


def skipped(reason: str) -> int:
    print(f"audit skipped: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
