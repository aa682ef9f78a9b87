"""The page, which Streamlit runs from top to bottom whenever a control changes: `page.py DEVICE FOLDER ...`."""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from sampler import SOLVERS
from spectral_forcing import SCHEDULES
from spectral_ops.schedule import GRIDS
from tools import report
from tools.explorer import plane, runs, trajectory
from util.checkpoint.published import WEIGHTS
from util.config import SNR_FLOOR, all_flags, parse_labels
from util.errors import UserError
from util.io import FID_STATS
from util.log import read_log

MOST_IMAGES = 16
FLAGS = all_flags()
DEVICE, FOLDERS = torch.device(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]
Sampled = tuple[Path, str, Any, trajectory.Trajectory]  # network, weights, configuration, what happened


@contextmanager
def sentences() -> Iterator[None]:
    """Show an error that a sentence explains in its place on the page, and go on after the block."""
    try:
        yield
    except (UserError, OSError) as error:  # such as a checkpoint that training has just replaced
        st.error(plain(str(error)), icon=":material/error:")


def plain(text: str) -> str:
    """Return Markdown that shows a text as it is: names in files must not become pictures from elsewhere."""
    return re.sub(r"([\\`*_\[\]<$~:])", r"\\\1", text)


@st.cache_resource
def one_at_a_time() -> threading.Lock:
    """The lock of sampling, since browsers share networks."""
    return threading.Lock()


@st.cache_resource(max_entries=2, show_spinner="Reading the checkpoint ...")
def network(path: Path, ema: str, changed: float) -> tuple[Any, Any]:
    """Load a network, once as long as its files do not change."""
    return trajectory.load_network(path, ema, DEVICE)


def load(path: Path, ema: str) -> tuple[Any, Any]:
    return network(path, ema, max(p.stat().st_mtime for p in (path, *path.glob("checkpoint-*"))))


def about(name: str) -> str:
    """The help of a control that is a flag of main_jit.py."""
    return f"`--{name}`: {FLAGS[name].metadata['help']}"


# --------------------------------------------------------------------------------------------------- frequency and time


@st.fragment
def plane_tab() -> None:
    controls, pictures = st.columns((1, 3), gap="large")
    with controls:
        file = st.file_uploader("Your own image (it stays on this machine)", ("png", "jpg", "jpeg", "webp"))
        size = st.select_slider("Pixels along a side", (32, 64, 128, 256), 128)
    x = plane.photograph(size)
    with pictures, sentences():
        x = plane.upload(file.getvalue(), size) if file else x
    with pictures, sentences():
        files = {path.stem: path for path in sorted(FID_STATS.glob(f"*_{size}_spectrum.npz"))}
        with controls:
            name = st.selectbox(
                "Spectrum",
                ["this image", *files],
                help="of the colours, for snr and budget: this image's, or one in fid_stats/ of this size",
            )
            power, dct_power = plane.powers_of_file(files[name]) if name in files else plane.powers_of_image(x)
            scale, alpha = plane.power_law(power)
            schedule = st.segmented_control(
                "Schedule", SCHEDULES, default="linear", required=True, help=about("sf_schedule")
            )
            settings = {"alpha": alpha, "snr_floor": SNR_FLOOR} | controls_of(schedule, size)
        operators = {name: plane.build(name, size, power, dct_power, **settings) for name in SCHEDULES}
        title = f"Where {name} rises above the noise, and the cutoff of the schedule {schedule}"
        st.pyplot(plane.draw_plane(power, operators, schedule, title))
        st.caption(
            "Red: the data are stronger than the noise. Frequencies below the thick line reach the network, those "
            "above do not; thin lines are the other schedules. "
            f"This spectrum is about {scale:.3g} / k^{alpha:.2f}. The schedule power assumes 1 / k^alpha: for this "
            f"spectrum divide its SNR at the cutoff by {scale:.3g}."
        )
        st.pyplot(plane.draw_rows(plane.rows(x, operators[schedule])))


def controls_of(schedule: str, size: int) -> dict[str, Any]:
    """Show the controls that a schedule has, and return the arguments of SpectralForcing."""
    kappa, budget = FLAGS["sf_kappa"].default, FLAGS["sf_budget"].default
    windows = {"whole image": None} | {f"{n} px": n for n in (4, 8, 16, 32, 64, 128) if n < size}
    found = {
        "c_min": st.slider("c_min", 0.0, 1.0, FLAGS["sf_c_min"].default, help=about("sf_c_min")),
        "c_max": st.slider("c_max", 0.0, 1.2, FLAGS["sf_c_max"].default, help=about("sf_c_max")),
        "kappa": st.slider("kappa", 5.0, 100.0, kappa, 1.0, help=about("sf_kappa")),
        "window_size": windows[st.selectbox("Window", list(windows), help=about("window_size"))],
    }
    if schedule == "linear" and st.checkbox("Independent of t", help=about("disable_dct_scale_schedule")):
        found["fixed_scale"] = st.slider("f", 0.0, 1.0, 0.5, help=about("dct_fixed_scale"))
    if schedule == "power":
        found["alpha"] = st.slider("alpha", 0.5, 5.0, 2.5, 0.1, help=about("sf_alpha"))
    if schedule in ("power", "snr"):
        floors = (0.001, 0.003, 0.01, SNR_FLOOR, 0.1, 0.3, 1.0, 3.0, 10.0)
        found["snr_floor"] = st.select_slider("SNR at the cutoff", floors, SNR_FLOOR, help=about("sf_snr_floor"))
    if schedule == "budget":
        shares = (0.001, 0.003, 0.01, budget, 0.1, 0.3, 1.0)
        found["budget"] = st.select_slider("Budget", shares, budget, help=about("sf_budget"))
    return found


# ------------------------------------------------------------------------------------------------------------ a network


@st.fragment
def network_tab() -> None:
    networks = runs.find_networks(FOLDERS)
    if not networks:
        st.info("There is no checkpoint and no export in the given folders. `make demo` trains a small network.")
        return
    first, second, third, fourth = st.columns((2, 1, 1, 1), vertical_alignment="bottom")
    labels = first.text_input("Classes", "3", help=f"such as 3,1,4 or 0-9; at most {MOST_IMAGES} images")
    seed = second.number_input("Seed", 0, help="the noise, which is the same for both sides")
    columns = third.slider("Times shown", 2, 8, 5)
    sides = st.columns(2, gap="medium") if fourth.toggle("Compare two") else [st.container()]
    chosen = []
    for i, side in enumerate(sides):
        with side, sentences():
            chosen.append(choose(networks, i))
    if st.button("Sample", type="primary", disabled=len(chosen) < len(sides)):
        st.session_state["sampled"] = []
        with sentences():
            st.session_state["sampled"] = [sampled(*side, int(seed), labels, columns) for side in chosen]
    if found := st.session_state.get("sampled"):
        show(found)


def choose(networks: list[Path], i: int) -> tuple[Path, str, dict[str, Any]]:
    """Show the controls of one side, and return the network, which weights, and the settings of sampling."""
    a, b, c = st.columns((3, 1, 1))
    path = a.selectbox("Network", networks, min(i, len(networks) - 1), format_func=str, key=f"network {i}")
    ema = b.selectbox("Weights", list(WEIGHTS), list(WEIGHTS).index("ema1"), key=f"ema {i}", help=about("ema"))
    config = load(path, ema)[1]
    key = f"{i} {path}"  # the controls of another network start at its own settings
    cfg = c.number_input("cfg", value=float(config.cfg), step=0.1, key=f"cfg {key}", help=about("cfg"))
    a, b, c, d = st.columns((1, 1, 1, 2))
    solvers, grids = list(SOLVERS), list(GRIDS)
    ends = float(config.interval_min), float(config.interval_max)
    solver, grid, steps = solvers.index(config.sampling_method), grids.index(config.sampling_grid), "num_sampling_steps"
    settings = {
        "cfg": cfg,
        "sampling_method": a.selectbox("Solver", solvers, solver, key=f"solver {key}", help=about("sampling_method")),
        steps: b.number_input("Steps", 1, None, config.num_sampling_steps, key=f"steps {key}", help=about(steps)),
        "sampling_grid": c.selectbox("Grid", grids, grid, key=f"grid {key}", help=about("sampling_grid")),
    }
    low, high = d.slider("Guidance between t", 0.0, 1.0, ends, key=f"ends {key}", help=about("interval_min"))
    return path, ema, settings | {"interval_min": low, "interval_max": high}


def sampled(path: Path, ema: str, settings: dict[str, Any], seed: int, labels: str, columns: int) -> Sampled:
    """Sample with one side's settings."""
    denoiser, config = load(path, ema)
    config = trajectory.with_settings(config, {**settings, "seed": seed})
    if len(classes := parse_labels(labels, config.class_num)) > MOST_IMAGES:
        raise UserError(f"{len(classes)} images are more than the {MOST_IMAGES} that are shown: name fewer classes.")
    bar = st.progress(0.0)

    def on_step(t: float) -> None:  # ends the computation when the browser has left
        bar.progress(t, plain(f"Sampling with {path}: t = {t:.2f}"))

    with one_at_a_time():
        found = trajectory.follow(denoiser, config, classes, columns, on_step)
    bar.empty()
    return path, ema, config, found


def show(found: list[Sampled]) -> None:
    """Draw trajectories side by side, with the same axis of power."""
    labels, image = min((one[3].labels for one in found), key=len), 0
    if len(labels) > 1:
        choices = {f"{i + 1}: class {label}": i for i, label in enumerate(labels)}
        image = choices[st.segmented_control("Image", list(choices), default=next(iter(choices)), required=True)]
    ranges = [trajectory.power_range(one[3], image) for one in found]
    power = min(low for low, _ in ranges), max(high for _, high in ranges)
    for (path, ema, config, one), column in zip(found, st.columns(len(found)), strict=True):
        guidance = f"cfg {config.cfg:g} for t in {config.interval_min:g} to {config.interval_max:g}"
        grid = f"{config.num_sampling_steps} steps, {config.sampling_grid} grid"
        column.markdown(
            f"**{plain(str(path))}**, {ema}  \n{config.sampling_method}, {grid}, {guidance}, seed {config.seed}"
        )
        column.pyplot(trajectory.draw(one, image, power), width="stretch" if len(found) > 1 else 900)
    first, last = found[0][3].x[image], found[-1][3].x[image]
    if len(found) > 1 and first.shape == last.shape:
        st.caption(f"The images differ by {(first - last).square().mean().sqrt():.3f} (RMS; pixels are from -1 to 1).")


# ----------------------------------------------------------------------------------------------------------------- runs


@st.fragment
def runs_tab() -> None:
    there = runs.find_runs(FOLDERS)
    if not there:
        st.info("There is no run in the given folders: a run has a file log.jsonl.")
        return
    left, right = st.columns((5, 1), vertical_alignment="bottom")
    chosen = left.multiselect("Runs", there, there[:2], format_func=str)
    right.button("Read again", icon=":material/refresh:")
    curves = {}
    for run in chosen:
        with sentences():
            curves[str(run)] = runs.curves(read_log(run))
    if any(curves.values()):
        st.pyplot(runs.draw_curves(curves))
    st.markdown("##### Evaluations")
    if any(report.files_of(run) for run in chosen):
        with sentences():
            rows, metrics, warnings = report.read(chosen)
            for warning in warnings:
                st.warning(plain(warning))
            st.code(report.table(rows, metrics), language=None)
    else:
        st.write("None yet: `main_jit.py --evaluate_gen --resume DIR` makes one.")
    st.markdown("##### Samples over epochs")
    for run, column in zip(chosen, st.columns(max(len(chosen), 2)), strict=False):
        with column, sentences():
            grids = {str(path.relative_to(run / "samples")): path for path in runs.sample_grids(run)}
            name = next(reversed(grids), None)
            if len(grids) > 1:
                name = st.select_slider(plain(str(run)), list(grids), name, key=f"grid of {run}")
            if name:
                st.image(runs.picture(grids[name]), plain(f"{run}: {name}"), width="stretch", output_format="PNG")
            else:
                st.write(plain(f"{run} has no samples yet."))


st.set_page_config("Spectral JiT", layout="wide")
st.html("<style>.block-container {padding-top: 2.5rem}</style>")
tabs = {"Frequency and time": plane_tab, "A network": network_tab, "Runs": runs_tab}
opened = st.session_state.setdefault("opened", set())  # what is not opened is not computed
for tab, (name, show_tab) in zip(st.tabs(list(tabs), on_change="rerun"), tabs.items(), strict=True):
    if tab.open or name in opened:
        opened.add(name)
        with tab, sentences():
            show_tab()
