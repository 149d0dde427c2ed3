"""The report in a real browser, from disk."""

import shutil
import subprocess

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smoke")]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = "--disable-background-networking --disable-component-update --disable-sync --no-first-run --disable-quic"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_opens_from_disk_and_shows_its_figures(smoke, tmp_path):
    page = smoke.folder / "results" / "report" / "index.html"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *QUIET.split(), f"--user-data-dir={tmp_path}"]
    shot = tmp_path / "page.png"
    run = subprocess.run(
        [*command, "--window-size=1200,5200", f"--screenshot={shot}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[1] == 1200
    inked = (pixels < 0.5).any(axis=(1, 2))
    # Figures and tables reach far down the page.
    assert inked.mean() > 0.4
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert dom.count("<svg") == 12
    assert "model_seed_neox" in dom
