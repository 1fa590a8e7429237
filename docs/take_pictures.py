"""Takes the pictures of docs/mlflow.md from a running MLflow server, in a browser without a window.

    pip install playwright pillow
    python docs/take_pictures.py http://127.0.0.1:5000 --study shakespeare --browser /usr/bin/chromium --to docs/images

The server holds a study of that name over lr, dropout and batch_size, all trials completed, and a run of its own; the
commands are in docs/mlflow.md. Made for MLflow 3.17: what it clicks at may have moved in another.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Page, sync_playwright

SETTINGS = {  # of the page: the face for training, no assistant
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
}
COLOURS = 128


class Camera:
    """A page of the server, and where its pictures go."""

    def __init__(self, page: Page, server: str, folder: Path) -> None:
        self.page, self.server, self.folder = page, server, folder
        page.add_init_script(
            "".join(
                f"localStorage.setItem({json.dumps(name)}, {json.dumps(value)});" for name, value in SETTINGS.items()
            )
        )

    def open(self, path: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(f"{self.server}/#/{path}")
        self.settle(4)

    def settle(self, seconds: float = 1.5) -> None:
        """Charts and lists draw themselves in their own time."""
        self.page.wait_for_timeout(1000 * seconds)

    def take(self, name: str, height: int | None = None) -> None:
        """The upper part of the page, in a palette."""
        self.page.mouse.move(1200, 40)
        self.page.evaluate("document.elementFromPoint(innerWidth - 36, innerHeight - 36)?.closest('button')?.remove()")
        self.settle()
        image = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        image = image.crop((0, 0, image.width, height or image.height))
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(self.folder / f"mlflow_{name}.png", optimize=True)

    def choose(self, box: int, option: str) -> None:
        """An axis of a plot."""
        self.page.locator("[role=combobox]:visible").nth(box).click()
        self.page.get_by_role("option", name=option, exact=True).click()
        self.settle(0.5)


def runs_of(server: str, study: str) -> tuple[str, list[str], str]:
    """The experiment, the trials of a study, and a run that belongs to none."""
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("lmtrain").experiment_id
    runs = client.search_runs([experiment])
    of_study = [run for run in runs if run.data.tags.get("study") == study and "trial" in run.data.tags]
    trials = [run.info.run_id for run in of_study]
    return experiment, trials, next(run.info.run_id for run in runs if "study" not in run.data.tags)


def take_table(camera: Camera, experiment: str, study: str) -> None:
    page = camera.page
    camera.open(f"experiments/{experiment}/runs")
    page.get_by_role("button", name="Columns").click()
    for column in ("Dataset", "Source", "Models", "val/loss", "lr", "dropout", "batch_size", "status"):
        page.get_by_placeholder("Search columns").fill(column)
        camera.settle(0.7)
        page.get_by_text(column, exact=True).last.click()
    page.mouse.click(900, 60)
    page.locator("[row-id]").filter(has_text=study).first.locator(".ag-cell").nth(1).locator("button").first.click()
    camera.take("table")
    page.get_by_placeholder("metrics.rmse").fill(f'tags.study = "{study}" and params.lr != ""')
    page.keyboard.press("Enter")
    camera.settle(3)
    for _ in range(2):  # the second time the lowest comes first
        page.get_by_text("val/loss", exact=True).first.click()
        camera.settle(2)
    page.mouse.click(238, 234)  # all of them
    camera.take("chosen", height=690)


def take_comparison(camera: Camera, experiment: str, trials: list[str]) -> None:
    page = camera.page
    camera.open(f"compare-runs?runs={json.dumps(trials, separators=(',', ':'))}&experiments=[%22{experiment}%22]")
    page.locator("[class*=selection-item-remove]").last.click()  # which metric it begins with is chance
    page.locator("[role=combobox]").nth(1).click()
    option = page.locator("[class*=virtual-list] [title='val/loss']")
    for _ in range(20):
        if option.count():
            break
        page.mouse.move(330, 480)
        page.mouse.wheel(0, 100)
        camera.settle(0.3)
    option.first.click()
    page.keyboard.press("Escape")
    page.get_by_text("Comparing").first.click()
    camera.take("parallel", height=600)
    for name, axes in (("Scatter", ("lr", "val/loss")), ("Contour", ("lr", "dropout", "val/loss"))):
        page.get_by_text(f"{name} Plot").click()
        camera.settle()
        for box, axis in enumerate(axes):
            camera.choose(box, axis)
        camera.take(name.lower(), height=640)


def take_run(camera: Camera, experiment: str, run: str) -> None:
    place = f"experiments/{experiment}/runs/{run}"
    camera.open(place)
    camera.take("run")
    camera.open(f"{place}/model-metrics")
    camera.page.get_by_text("summary", exact=False).first.click()
    camera.take("metrics")
    camera.open(f"{place}/system-metrics")
    camera.take("system", height=560)
    client = MlflowClient(camera.server)
    model = next(one for one in client.search_logged_models([experiment]) if one.source_run_id == run)
    camera.open(f"experiments/{experiment}/models/{model.model_id}")
    camera.take("model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("--study", required=True)
    parser.add_argument("--browser", help="a Chromium, if not Playwright's own")
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    experiment, trials, run = runs_of(options.server, options.study)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        camera = Camera(browser.new_page(viewport={"width": 1400, "height": 820}), options.server, options.to)
        take_table(camera, experiment, options.study)
        take_comparison(camera, experiment, trials)
        take_run(camera, experiment, run)
        browser.close()


if __name__ == "__main__":
    main()
