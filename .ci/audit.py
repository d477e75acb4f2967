"""Known vulnerabilities of the installed packages, by pip-audit; a part of `make lint`.

Exit code 1 when there are any. Where pip-audit is not installed, or the index with the advisories does not answer, one line
says that nothing was audited, and the exit code is 0: a check that needs a network must not decide without one.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request

SERVICE = "https://pypi.org/pypi/pip/json"
"""Where pip-audit asks, too."""
QUICK, LONG = 5, 300
"""Seconds that the first answer, and all of them, may take."""


def main() -> int:
    """Returns the exit code."""
    if importlib.util.find_spec("pip_audit") is None:
        return skipped("pip-audit is not installed")
    try:
        with urllib.request.urlopen(SERVICE, timeout=QUICK):
            pass
    except (OSError, ValueError) as error:
        return skipped(f"the index does not answer ({error})")
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--progress-spinner",
        "off",
        "--skip-editable",
        "--local",
        "--format",
        "json",
    ]
    try:
        done = subprocess.run([*command, *sys.argv[1:]], capture_output=True, text=True, timeout=LONG, check=False)
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
    bad = sum(bool(package["vulns"]) for package in known)
    print(
        f"audit: {bad} of {len(known)} packages with known vulnerabilities; {len(packages) - len(known)} unknown to the index"
    )
    return 1 if bad else 0


def skipped(reason: str) -> int:
    print(f"audit skipped: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
