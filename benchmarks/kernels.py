"""Time, memory and compile time of the kernels, beside dynamax, statsmodels and what the machine allows.

    python benchmarks/kernels.py                      # the whole grid, both dtypes
    python benchmarks/kernels.py --shapes 50,200,20,6 --dtypes float64 --sections filter smoother
    python benchmarks/kernels.py --sections parallel  # parallel against sequential, 1e2 to 1e6 steps
    python benchmarks/kernels.py --sections accuracy  # single precision at 1e5 steps

Competitors run interleaved in one process, compiled and warm; times are medians, `ratio` is the peer's time over ours. Results are
compared before times (`differs`: largest difference over the largest entry; dynamax adds 1e-9 to a diagonal, and its covariances are
those of that model). `floor` is two reads of the data at the bandwidth, and the two products with the emission weights at the
matrix-product rate, both measured here. Memory is what the compiled program allocates beside its arguments. Rows of
unlike models say so. The first call of a function, less a warm one, is its compile time. Nothing here asks for a CPU: on
another device the same command measures that device.
"""

import argparse
import dataclasses
import platform
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

GRID = [(200, 200, 100, 8), (500, 300, 200, 10), (50, 200, 20, 6), (10, 200, 2, 2), (1, 1000, 10, 4)]
CLAMPED = [((200, 200, 100, 8), 8), ((50, 200, 20, 6), 50)]
LONG = (1, 100_000, 10, 4)
SECTIONS = ("filter", "smoother", "em", "gradient", "clamps", "long", "accuracy", "parallel")
HEADER = (
    "K, T, N, D", "dtype", "what", "peer", "ours (ms)", "peer (ms)", "ratio", "ours / floor",
    "memory ours, peer (MB)", "compile ours, peer (s)", "differs",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--shapes", nargs="+", type=shape, default=GRID, metavar="K,T,N,D")
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"], choices=["float64", "float32"])
    parser.add_argument("--sections", nargs="+", default=SECTIONS[:-2], choices=SECTIONS)
    parser.add_argument("--parallel", action="store_true", help="the same as --sections parallel")
    parser.add_argument("--long", type=shape, default=LONG, metavar="K,T,N,D", help="shape of the one long trial")
    parser.add_argument("--most-steps", type=int, default=1_000_000, help="longest sequence of the section parallel")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for a busy machine"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the compilation that reads the memory")
    arguments = parser.parse_args()
    if arguments.parallel:
        arguments.sections = ("parallel",)
    if len(arguments.dtypes) > 1:  # one process each: dynamax promotes to the widest dtype that is switched on
        at = sys.argv.index("--dtypes") if "--dtypes" in sys.argv else len(sys.argv)
        rest = sys.argv[1:at] + sys.argv[at + 1 + len(arguments.dtypes) :]
        for dtype in arguments.dtypes:
            subprocess.run([sys.executable, __file__, *rest, "--dtypes", dtype], check=True)
        return
    jax.config.update("jax_enable_x64", arguments.dtypes == ["float64"])
    Benchmark(arguments).run()


class Benchmark:
    """One process, one dtype."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.dtype = np.dtype(arguments.dtypes[0])
        self.clock = time.perf_counter if arguments.clock == "wall" else time.process_time

    def run(self) -> None:
        device = jax.devices()[0]
        print(f"\n{device.device_kind} ({platform.machine()}), {self.dtype}, JAX {jax.__version__}", end="")
        print(f", {self.arguments.clock} time, median of {self.arguments.repeats}\n")
        for section in self.arguments.sections:
            if section == "parallel":
                self.parallel()
            elif section == "accuracy":
                self.accuracy()
            else:
                print_row(HEADER)
                print_row(["---"] * len(HEADER))
                if section in ("clamps", "long"):
                    getattr(self, section)()
                else:
                    for shape in self.arguments.shapes:
                        getattr(self, section)(shape)
            print(flush=True)

    # Sections

    def filter(self, shape: tuple) -> None:
        import issm

        for name, diagonal in (("filter, diagonal R", True), ("filter, full R", False)):
            model = Model(shape, self.dtype, diagonal)
            peer = jax.jit(jax.vmap(dynamax().lgssm_filter, in_axes=(None, 0)))
            self.compare(
                name, model, lambda m: issm.lgssm_filter(m.params, m.emissions), lambda m, f=peer: f(m.peer, m.emissions),
                lambda a, b: differences(a, b, "marginal_loglik", "filtered_means", "filtered_covariances"),
            )  # fmt: skip

    def smoother(self, shape: tuple) -> None:
        import issm

        for name, diagonal in (("smoother, diagonal R", True), ("smoother, full R", False)):
            model = Model(shape, self.dtype, diagonal)
            peer = jax.jit(jax.vmap(dynamax().lgssm_smoother, in_axes=(None, 0)))
            self.compare(
                name, model, lambda m: issm.lgssm_smoother(m.params, m.emissions), lambda m, f=peer: f(m.peer, m.emissions),
                lambda a, b: differences(a, b, "marginal_loglik", "smoothed_means", "smoothed_covariances"),
            )  # fmt: skip

    def em(self, shape: tuple) -> None:
        from dynamax.linear_gaussian_ssm import LinearGaussianSSM

        model = Model(shape, self.dtype, diagonal=False).away_from_optimum()
        peer = LinearGaussianSSM(model.state_dim, model.emission_dim)
        _, props = peer.initialize(jax.random.PRNGKey(0))
        # With several trials dynamax subtracts K^2 instead of K times the squared mean from the initial covariance: from the
        # second iteration on, two likelihoods are those of different parameters.
        same = 2 if shape[0] == 1 else 1

        @partial(jax.jit, static_argnums=1)
        def peer_fit(params, num_steps, emissions):
            def step(params, _):
                stats, log_probs = jax.vmap(partial(peer.e_step, params))(emissions)
                return peer.m_step(params, props, stats, None)[0], log_probs.sum()

            return jax.lax.scan(step, params, None, length=num_steps)

        unlike = model.with_params(Model(shape, self.dtype, diagonal=True).away_from_optimum().params, model.peer)
        for name, both in (("EM, full R both", model), ("EM, unlike: diagonal R ours, full R theirs", unlike)):
            # In single precision the gain may be rounding before the fourth update, and the fit then ends.
            num = len(em_log_probs(both, 4)) - 2
            jax.clear_caches()  # so that the first call compiles
            self.compare(
                name, both,
                lambda m, num=num: em_log_probs(m, num + 1),
                lambda m, num=num: peer_fit(m.peer, num + 1, m.emissions)[1],
                lambda a, b: {"log_probs": relative(a[:same], b[:same])},
                baseline=(lambda m: em_log_probs(m, 1), lambda m: peer_fit(m.peer, 1, m.emissions)[1]),
                per=num,
            )  # fmt: skip

    def gradient(self, shape: tuple) -> None:
        def compare(a, b):
            mine, theirs = a[1], b[1]
            found = {"value": relative(a[0], b[0])}
            for part, field in (("dynamics", "weights"), ("dynamics", "cov"), ("emissions", "weights")):
                left, right = (getattr(getattr(both, part), field) for both in (mine, theirs))
                if (
                    field == "cov"
                ):  # autodiff through their filter is not symmetric, and only the symmetric part has a meaning
                    left, right = left + left.T, right + right.T
                found[field] = relative(left, right)
            return found

        for diagonal in (True, False):
            model = Model(shape, self.dtype, diagonal)
            ours, peer = log_prob_gradients(model)
            name = f"value and gradient, {'diagonal' if diagonal else 'full'} R"
            self.compare(name, model, lambda m, f=ours: f(m.params), lambda m, f=peer: f(m.peer, m.emissions), compare)

    def clamps(self) -> None:
        import issm

        shapes = CLAMPED if self.arguments.shapes == GRID else [(s, min(8, s[0])) for s in self.arguments.shapes]
        for shape, num_patterns in shapes:
            model = Model(shape, self.dtype, diagonal=True)
            plan = model.clamp(num_patterns)
            batched, axes = model.peer_under(plan)
            for name in ("filter", "smoother"):
                ours, peer = getattr(issm, f"lgssm_{name}"), getattr(dynamax(), f"lgssm_{name}")
                peer = jax.jit(jax.vmap(peer, in_axes=(axes, 0)))
                kind = "every trial its own" if num_patterns == shape[0] else f"{num_patterns} patterns"
                self.compare(
                    f"{name}, clamps: {kind}", model,
                    lambda m, f=ours, plan=plan: f(m.params, m.emissions, interventions=plan),
                    lambda m, f=peer, batched=batched: f(batched, m.emissions),
                    lambda a, b: differences(a, b, "marginal_loglik", "filtered_means", "filtered_covariances"),
                    label="dynamax, time-varying parameters by trial",
                )  # fmt: skip

    def long(self) -> None:
        from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

        import issm

        model = Model(self.arguments.long, self.dtype, diagonal=True)
        peer = KalmanFilter(model.emission_dim, model.state_dim, dtype=self.dtype)
        numpy = model.numpy
        peer.bind(np.asarray(model.emissions[0], order="C").T.copy(order="F"))
        peer["design"], peer["transition"] = numpy["emissions_weights"], numpy["dynamics_weights"]
        peer["selection"], peer["state_cov"] = np.eye(model.state_dim, dtype=self.dtype), np.diag(numpy["dynamics_cov"])
        peer["obs_cov"] = np.diag(numpy["emissions_cov"])
        peer.initialize_known(numpy["initial_mean"], np.diag(numpy["initial_cov"]))
        log_prob = lambda m: issm.marginal_log_prob(m.params, m.emissions)  # noqa: E731
        compare = lambda a, b: {"loglik": relative(a[0], b)}  # noqa: E731
        label = "statsmodels"
        self.compare(
            "marginal_log_prob", model, log_prob, lambda _: peer.loglike(), compare, label=label, compiled=False
        )

    def accuracy(self) -> None:
        """Single precision against double, where plain forms fail."""
        if self.dtype == np.float64:
            print("accuracy: see float32")
            return
        code = f"""
import jax, numpy as np, sys
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {str(sys.path[0])!r})
import kernels, issm
model = kernels.Model({(1, self.arguments.long[1], 12, 6)}, np.float32, True, noise=1e-6, prior=1e6, root=0.9999)
double = jax.tree.map(lambda leaf: leaf.astype("float64"), model.params)
exact = issm.lgssm_filter(double, np.float64(model.emissions), method="sqrt").marginal_loglik
for method in ("auto", "sqrt", "sequential"):
    posterior = issm.lgssm_smoother(model.params, model.emissions, method=method)
    finite = bool(np.isfinite(posterior.smoothed_covariances).all())
    lowest = np.linalg.eigvalsh(np.float64(posterior.smoothed_covariances[0])).min() if finite else np.nan
    error = kernels.relative(posterior.marginal_loglik, exact)
    print(f"| {{method}} | {{error:.1e}} | {{finite}} | {{lowest:.1e}} |")
"""
        print("| method | relative error of the log-likelihood | finite | smallest eigenvalue of a covariance |")
        print("|---|---|---|---|", flush=True)
        subprocess.run([sys.executable, "-c", code], check=True)

    def parallel(self) -> None:
        import issm

        print(
            "| T (K = 1, N = 10, D = 4) | sequential (ms) | parallel (ms) | sqrt (ms) | sequential / parallel | differs |"
        )
        print("|---|---|---|---|---|---|", flush=True)
        steps = 100
        while steps <= self.arguments.most_steps:
            model = Model((1, steps, 10, 4), self.dtype, diagonal=True)
            functions = [
                lambda m, method=method: issm.lgssm_smoother(m.params, m.emissions, method=method)
                for method in ("sequential", "parallel", "sqrt")
            ]
            results = [jax.block_until_ready(function(model)) for function in functions]
            found = differences(results[1], results[0], "marginal_loglik", "smoothed_means", "smoothed_covariances")
            times = self.times(functions, model)
            milliseconds = " | ".join(f"{1e3 * t:.2f}" for t in times)
            print(f"| {steps} | {milliseconds} | {times[0] / times[1]:.2f} | {max(found.values()):.0e} |", flush=True)
            steps *= 10

    # Measuring

    def compare(
        self, name, model, ours, peer, same, *, baseline=None, per=1, label="dynamax 1.0.3", compiled=True
    ) -> None:
        first, results = [], []
        for function in (ours, peer):
            start = time.perf_counter()
            results.append(jax.block_until_ready(function(model)))
            first.append(time.perf_counter() - start)
        differs = same(*results)
        del results
        functions = [ours, peer, *(baseline or ())]
        times = self.times(functions, model)
        compile_times = [max(a - b, 0.0) for a, b in zip(first, times[:2], strict=True)]
        if baseline:
            times = [(times[i] - times[i + 2]) / per for i in range(2)]
        memory = ["–", "–"]
        if compiled and not self.arguments.no_memory:
            memory = [f"{self.memory(ours, model, known=True):.3g}", f"{self.memory(peer, model, known=False):.3g}"]
        floor = self.floor(model)
        print_row(
            (
                ", ".join(map(str, model.shape)), self.dtype.name, name, label, f"{1e3 * times[0]:.3g}",
                f"{1e3 * times[1]:.3g}", f"{times[1] / times[0]:.2f}", f"{times[0] / floor:.1f}", ", ".join(memory),
                f"{compile_times[0]:.1f}, " + (f"{compile_times[1]:.1f}" if compiled else "–"),
                ", ".join(f"{key} {value:.0e}" for key, value in differs.items()),
            )
        )  # fmt: skip

    def times(self, functions: list, model: "Model") -> list[float]:
        """Median times of the functions, taken in turns."""
        taken: list[list[float]] = [[] for _ in functions]
        for function in functions:
            jax.block_until_ready(function(model))
        for _ in range(self.arguments.repeats):
            for function, own in zip(functions, taken, strict=True):
                start = self.clock()
                jax.block_until_ready(function(model))
                own.append(self.clock() - start)
        return [statistics.median(own) for own in taken]

    def memory(self, function, model: "Model", known: bool) -> float:
        """Megabytes that the compiled function allocates: temporaries and results. Data are `known` when they are not traced."""
        emissions = None if known else model.emissions
        whole = jax.jit(lambda params, peer, emissions: function(model.with_params(params, peer, emissions)))
        analysis = whole.lower(model.params, model.peer, emissions).compile().memory_analysis()
        return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 1e6

    def floor(self, model: "Model") -> float:
        """Seconds for two reads of the data and two products with the emission weights."""
        size = 1024
        square = jnp.ones((size, size), self.dtype)
        read = jax.jit(lambda model_emissions: model_emissions.sum())
        product = jax.jit(lambda a: a @ a)
        emissions = model.emissions
        if emissions.nbytes < 2**25:  # a bandwidth, not the cost of a call
            emissions = jnp.ones(2**25 // self.dtype.itemsize, self.dtype)
        times = self.times([lambda _: read(emissions), lambda _: product(square)], model)
        flops = 2 * 2 * model.emissions.size * model.state_dim
        return 2 * model.emissions.nbytes * times[0] / emissions.nbytes + flops * times[1] / (2 * size**3)


class Model:
    """A random stable model, data drawn from it, and the same model in dynamax's form."""

    def __init__(self, shape: tuple, dtype, diagonal: bool, noise: float = 0.5, prior: float = 1.0, root: float = 0.97):
        import issm

        self.shape = shape
        num_trials, num_timesteps, self.emission_dim, self.state_dim = shape
        rng, dim = np.random.default_rng(0), shape[3]
        basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
        fields = {
            "initial_mean": np.zeros(dim),
            "initial_cov": np.full(dim, prior),
            "dynamics_weights": (basis * np.linspace(0.7, root, dim)) @ basis.T,
            "dynamics_cov": np.full(dim, 0.1),
            "emissions_weights": rng.normal(size=(shape[2], dim)),
            "emissions_cov": noise * rng.uniform(0.5, 1.5, shape[2]),
        }
        self.numpy = {name: field.astype(dtype) for name, field in fields.items()}
        state, emissions = np.sqrt(prior) * rng.normal(size=(num_trials, dim)), np.zeros(shape[:3], dtype)
        for t in range(num_timesteps):
            spread = np.sqrt(fields["emissions_cov"]) * rng.normal(size=(num_trials, shape[2]))
            emissions[:, t] = state @ fields["emissions_weights"].T + spread
            state = state @ fields["dynamics_weights"].T + np.sqrt(0.1) * rng.normal(size=state.shape)
        self.emissions = jnp.asarray(emissions)
        matrices = {name: np.diag(field) if name.endswith("cov") else field for name, field in self.numpy.items()}
        chosen = matrices | ({"emissions_cov": self.numpy["emissions_cov"]} if diagonal else {})
        chosen = {name: jnp.asarray(field) for name, field in chosen.items()}
        self.params = issm.make_lgssm_params(**chosen)
        self.peer = None
        if noise == 0.5:
            zeros = {"dynamics_bias": jnp.zeros(dim, dtype), "emissions_bias": jnp.zeros(shape[2], dtype)}
            zeros["dynamics_input_weights"] = jnp.zeros((dim, 0), dtype)
            zeros["emissions_input_weights"] = jnp.zeros((shape[2], 0), dtype)
            self.peer = dynamax().make_lgssm_params(**chosen, **zeros)

    def with_params(self, params, peer, emissions=None) -> "Model":
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__ | {"params": params, "peer": peer})
        other.emissions = self.emissions if emissions is None else emissions
        return other

    def away_from_optimum(self) -> "Model":
        """Both models with weaker weights and more noise, so that a fit in single precision does not end at once."""
        other = self.with_params(self.params, self.peer)
        for name in ("params", "peer"):
            own = getattr(self, name)
            emissions = own.emissions
            fields = {"cov": 2 * emissions.cov, "weights": 0.9 * emissions.weights}
            if name == "peer":
                changed = own._replace(emissions=emissions._replace(**fields))
            else:
                changed = dataclasses.replace(own, emissions=dataclasses.replace(emissions, **fields))
            setattr(other, name, changed)
        return other

    def clamp(self, num_patterns: int):
        """Clamps of one state in a random window of every pattern; nearly perfect, for dynamax factors covariances."""
        import issm

        num_trials, num_timesteps, _, dim = self.shape
        rng, mask = np.random.default_rng(1), np.zeros((num_patterns, num_timesteps, dim), bool)
        for pattern in range(num_patterns):
            start = 1 + rng.integers(max(num_timesteps // 2, 1))
            mask[pattern, start : start + max(num_timesteps // 4, 1), rng.integers(dim)] = True
            mask[pattern, 1 + pattern % (num_timesteps - 1), rng.integers(dim)] = True
        mask = np.resize(mask, (num_trials, num_timesteps, dim))
        value = rng.normal(size=mask.shape).astype(self.emissions.dtype)
        return issm.Intervention(mask, value, np.full(mask.shape, 1e-3, self.emissions.dtype))

    def peer_under(self, plan):
        """dynamax's parameters of every trial under its clamps, and the axes to map over."""
        mask, dim = plan.mask, self.state_dim
        kept = ~mask[..., :, None] & ~mask[..., None, :]
        dynamics = self.peer.dynamics
        noise = jnp.where(mask[..., None] & jnp.eye(dim, dtype=bool)[None, None], plan.variance[..., None], 0.0)
        weights = jnp.where(mask[..., None], 0.0, dynamics.weights[None, None])
        cov = jnp.where(kept, dynamics.cov[None, None], noise)
        bias = jnp.where(mask, plan.value, dynamics.bias[None, None])
        peer = self.peer._replace(dynamics=dynamics._replace(weights=weights, bias=bias, cov=cov))
        none = jax.tree.map(lambda _: None, self.peer)
        axes = none._replace(dynamics=none.dynamics._replace(weights=0, bias=0, cov=0))
        return jax.block_until_ready(peer), axes


def log_prob_gradients(model: Model):
    """Value and gradient of the log-likelihood of all trials, ours and the peer's, as functions of the parameters."""
    import issm

    def log_prob(params):  # data are known when compiled: trials share covariances
        return issm.marginal_log_prob(params, model.emissions).sum()

    def peer_log_prob(params, emissions):
        return jax.vmap(lambda y: dynamax().lgssm_filter(params, y).marginal_loglik)(emissions).sum()

    return jax.jit(jax.value_and_grad(log_prob)), jax.jit(jax.value_and_grad(peer_log_prob))


def em_log_probs(model: Model, num_iters: int, **options):
    import issm

    return issm.fit_em(model.params, model.emissions, num_iters=num_iters, tol=0.0, **options).log_probs


def dynamax():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dynamax.linear_gaussian_ssm import inference
    return inference


def differences(ours, peer, *names: str) -> dict[str, float]:
    return {name: relative(getattr(ours, name), getattr(peer, name)) for name in names}


def relative(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def print_row(cells) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
