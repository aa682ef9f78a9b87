"""Resolution that follows the spectrum: its bands, times and estimates against closed forms of Gaussian fields."""

import math

import pytest
import torch

from denoiser import Denoiser, LogitNormal, sample_step
from model_jit import JiT, rope_table, sincos_position_embedding
from sampler import sample
from spectral_forcing import SpectralForcing, dct_matrix, dct_rings, separable_transform
from spectral_ops.conditioning import ImageSchedules, InstanceTimeSampler
from spectral_ops.resolution import GROUP, LevelTimes, ResolutionSchedule, band_matrix, level_times, outside
from spectral_ops.schedule import GlobalTimeSampler, TightSchedule
from spectral_ops.spectrum import image_fits, rapsd
from util.rng import CounterRNG

N = 16
DELTAS = (0.01, 0.05, 0.2)


def ring_power(n: int = N, alpha: float = 2.5) -> torch.Tensor:
    """Variances of DCT modes in each ring, falling like k^-alpha from 20."""
    return 20 * torch.arange(1, len(dct_rings(n)[1]) + 1, dtype=torch.float64) ** -alpha


def mode_variance(n: int = N) -> torch.Tensor:
    return ring_power(n)[dct_rings(n)[0]]


class ExactNetwork(torch.nn.Module):
    """The best denoiser of a Gaussian field with independent modes, on images of any level."""

    def forward(self, z, t, y):
        m = z.shape[-1]
        p, t = mode_variance()[:m, :m], t.double()[:, None, None, None]
        modes = separable_transform(dct_matrix(m), z.double())
        return separable_transform(dct_matrix(m).T, modes * t * p / (t * t * p + (1 - t) ** 2)).to(z.dtype)


class ExactVelocity(ExactNetwork):
    def forward(self, z, t, y):
        return (super().forward(z, t, y) - z) / (1 - t)[:, None, None, None]


class TestBands:
    def test_a_level_holds_the_lowest_modes(self):
        x = torch.randn(2, 3, N, N, dtype=torch.float64)
        low = ResolutionSchedule(N, ring_power(), 2).reduce(x, 1)
        of_low = separable_transform(dct_matrix(N // 2), low)
        torch.testing.assert_close(of_low, separable_transform(dct_matrix(N), x)[..., : N // 2, : N // 2])

    @pytest.mark.parametrize("m", [2, 4, 8, 16])
    def test_white_noise_stays_white(self, m):
        band = band_matrix(N, m)
        torch.testing.assert_close(band @ band.T, torch.eye(m, dtype=torch.float64))

    def test_a_constant_image_stays_constant_and_doubles(self):
        low = ResolutionSchedule(N, ring_power()).reduce(torch.full((1, 1, N, N), 0.3), 1)
        torch.testing.assert_close(low, torch.full((1, 1, N // 2, N // 2), 0.6))

    def test_a_joined_image_has_the_given_band(self):
        schedule, low = ResolutionSchedule(N, ring_power(), 2), torch.randn(2, 3, N // 4, N // 4, dtype=torch.float64)
        z, t = torch.randn(2, 3, N, N, dtype=torch.float64), torch.tensor([0.1, 0.2])
        for velocity in (False, True):
            torch.testing.assert_close(schedule.reduce(schedule.join(low, z, t, velocity), 2), low, rtol=0, atol=1e-6)


class TestTimes:
    @pytest.mark.parametrize("delta", DELTAS)
    def test_hidden_rings_are_below_delta_until_the_time_of_a_level_and_not_after_it(self, delta):
        times = level_times(ring_power(), N, 3, delta)
        for level, time in enumerate(times, start=1):
            hidden = mode_variance()[outside(N, N >> level)]
            assert hidden.max() * (time / (1 - time)) ** 2 == pytest.approx(delta)
        assert times == tuple(sorted(times, reverse=True))

    def test_the_largest_colour_axis_decides(self):
        two = torch.stack([ring_power(), 0.01 * ring_power()])
        assert level_times(two, N, 2, 0.05) == level_times(ring_power(), N, 2, 0.05)

    def test_the_level_of_a_time(self):
        schedule = ResolutionSchedule(N, ring_power(), 2)
        first, second = schedule.times
        t = torch.tensor([0.0, second - 1e-4, second + 1e-4, first - 1e-4, first + 1e-4, 1.0])
        assert schedule.level_of(t).tolist() == [2, 2, 1, 1, 0, 0]

    def test_a_spectrum_without_high_frequencies_needs_no_whole_image(self):
        power = ring_power()
        power[N // 4 :] = 0
        assert level_times(power, N, 1, 0.05) == (1.0,)


class TestGaussianFields:
    @pytest.mark.parametrize("delta", DELTAS)
    @pytest.mark.parametrize("t", [0.02, 0.1, 0.2, 0.4, 0.9])
    def test_the_best_denoisers_of_all_levels_are_the_best_denoiser_of_the_whole_image(self, delta, t):
        z, time = torch.randn(2, 3, N, N, dtype=torch.float64), torch.tensor([t, t])
        levels = Denoiser(ExactNetwork(), resolution=ResolutionSchedule(N, ring_power(), 2, delta))
        whole = ExactNetwork()(z, time, None)
        torch.testing.assert_close(levels.predict(z, time, None).double(), whole, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("delta", DELTAS)
    def test_the_loss_is_the_least_possible(self, delta):
        """E (v - v_pred)^2 = mean over modes of P / (1 + SNR) / (1 - t)^2, at times of all three levels."""
        schedule = ResolutionSchedule(N, ring_power(), 2, delta)
        denoiser, generator = Denoiser(ExactNetwork(), resolution=schedule), torch.Generator().manual_seed(0)
        for t in (0.5 * schedule.times[1], schedule.times[1] + 0.01, schedule.times[0] + 0.01):
            e = torch.randn(4000, 1, N, N, generator=generator)
            x = torch.randn(4000, 1, N, N, generator=generator) * mode_variance().sqrt().float()
            x = separable_transform(dct_matrix(N).T.float(), x)
            found = denoiser(x, torch.zeros(4000), torch.full((4000,), t), e)
            least = (mode_variance() / (1 + mode_variance() * (t / (1 - t)) ** 2)).mean() / (1 - t) ** 2
            assert float(found) == pytest.approx(float(least), rel=0.02)

    @pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
    def test_both_predictions_of_a_hybrid_network(self, t):
        class Both(ExactNetwork):
            def forward(self, z, t, y):
                x = super().forward(z, t, y)
                return torch.cat([x, (x - z) / (1 - t)[:, None, None, None]], 1)

        z, time = torch.randn(2, 3, N, N, dtype=torch.float64), torch.tensor([t, t], dtype=torch.float64)
        denoiser = Denoiser(Both(), pred_param="hybrid", resolution=ResolutionSchedule(N, ring_power(), 2, 0.2))
        torch.testing.assert_close(
            denoiser.predict(z, time, None).double(), Both()(z, time, None), rtol=1e-5, atol=1e-5
        )

    def test_noise_of_another_scale(self):
        """Power is in units of the noise's: the estimate is t P / (t^2 P + (1 - t)^2 s^2) z, from P / s^2."""
        z, t, s = torch.randn(1, 1, N, N, dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64), 2.0
        x = ResolutionSchedule(N, ring_power() / s**2).join(torch.zeros(1, 1, 8, 8), z, t, velocity=False)
        p = mode_variance() * outside(N, 8)
        expected = 0.2 * p / (0.2**2 * p + 0.8**2 * s**2) * separable_transform(dct_matrix(N), z)
        torch.testing.assert_close(separable_transform(dct_matrix(N), x), expected)

    def test_the_estimate_follows_from_the_mean_over_colour_axes(self):
        axes = torch.stack([ring_power(), 0.1 * ring_power(), 0 * ring_power()])
        schedule, mean = ResolutionSchedule(N, axes), ResolutionSchedule(N, axes.mean(0))
        low, z, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, N, N), torch.tensor([0.1, 0.2])
        assert torch.equal(schedule.join(low, z, t, False), mean.join(low, z, t, False))
        assert schedule.times < mean.times  # and the times from the largest

    def test_tables_of_inference_serve_training(self):
        schedule, low = ResolutionSchedule(N, ring_power()), torch.zeros(1, 1, 8, 8, requires_grad=True)
        z, t = torch.randn(1, 1, N, N), torch.tensor([0.2])
        with torch.inference_mode():
            schedule.join(low.detach(), z, t, False)
        schedule.join(low, z, t, False).sum().backward()
        assert low.grad.abs().max() > 0

    @pytest.mark.parametrize("delta", DELTAS)
    @pytest.mark.parametrize("pred_param", ["x", "v"])
    def test_samples_have_the_spectrum_of_the_data(self, delta, pred_param):
        """The flow is linear and diagonal in the DCT: each mode of the noise is multiplied by sqrt(P)."""
        z = torch.randn(2, 1, N, N, dtype=torch.float64)
        network = ExactNetwork() if pred_param == "x" else ExactVelocity()
        schedule = ResolutionSchedule(N, ring_power(), 2, delta)
        denoiser = Denoiser(network, pred_param=pred_param, t_eps=1e-4, resolution=schedule)
        grid = torch.linspace(0, 1, 401)
        x = sample(lambda z, t: denoiser.velocity(z, t.expand(2), torch.zeros(2)), z, grid)
        gain = separable_transform(dct_matrix(N), x) / separable_transform(dct_matrix(N), z)
        torch.testing.assert_close(gain, mode_variance().sqrt().expand_as(gain), rtol=0.01, atol=1e-3)


class TestTimesOfTraining:
    def rng(self, count=4096):
        return CounterRNG(0, 0, torch.arange(count))

    @pytest.mark.parametrize("delta", DELTAS)
    @pytest.mark.parametrize("levels", [1, 2])
    @pytest.mark.parametrize("sampler", ["logit_normal", "uniform", "spectral"])
    def test_weighted_times_have_the_distribution_of_the_sampler(self, delta, levels, sampler):
        power = torch.linspace(3, -4, 12).double().exp()
        of = {
            "logit_normal": LogitNormal(),
            "uniform": GlobalTimeSampler(),
            "spectral": GlobalTimeSampler(TightSchedule.of_spectrum(power, power, N), 0.3),
        }[sampler]
        schedule = ResolutionSchedule(N, ring_power(), levels, delta)
        times = LevelTimes(of, schedule)
        t, weight, level = times.sample(self.rng()), times.weight(4096), torch.tensor(times.levels).repeat(512)
        inside = (t.double() - torch.tensor(schedule.times)[:, None]).abs().amin(0) > 1e-6  # but for rounding
        assert torch.equal(schedule.level_of(t)[inside], level[inside])
        assert float(weight.mean()) == pytest.approx(1)
        for end in (0.1, 0.3, 0.5, 0.7):
            found = float((weight * (t < end)).mean())
            assert found == pytest.approx(float(of.cdf(torch.tensor([end]))), abs=0.02)

    def test_each_image_keeps_the_density_of_its_own_times(self):
        """With times from the spectrum of each image: the weighted share below a time is that of the image."""
        x = (torch.rand(2, 3, N, N) - 0.5) * torch.tensor([0.1, 2.0])[:, None, None, None]
        x = x.repeat_interleave(2048, 0).view(2, 2048, 3, N, N).transpose(0, 1).reshape(-1, 3, N, N)  # alternately
        x = x[torch.arange(4096).view(-1, 16).view(-1, 8, 2).transpose(1, 2).flatten()]  # groups of 8 of one kind
        schedules = ImageSchedules(N, [0.0, 0.0, 0.0], 0.1)
        examples = image_fits(rapsd(x[:16]), x[:16].mean((2, 3)), torch.zeros(3), N)
        of = InstanceTimeSampler(schedules, "mixed", 0.1, examples)
        times = LevelTimes(of, ResolutionSchedule(N, ring_power(), 1)).for_images(x)
        t, weight, kind = times.sample(self.rng()), times.weight(4096), torch.arange(4096) // 8 % 2
        own = of.for_images(x)
        for number in (0, 1):
            mine = kind == number
            assert float(weight[mine].mean()) == pytest.approx(1, abs=1e-5)
            for end in (0.2, 0.5):
                expected = own.cdf(torch.full((4096,), end))[mine].mean()
                assert float((weight * (t < end))[mine].mean()) == pytest.approx(float(expected), abs=0.03)

    def test_each_level_has_a_position_and_the_shares_follow_the_probabilities(self):
        times = LevelTimes(LogitNormal(), ResolutionSchedule(N, ring_power(), 3, 0.001))
        assert sorted(times.levels) == [0, 0, 0, 0, 0, 1, 2, 3]
        mass = LogitNormal().cdf(torch.tensor(ResolutionSchedule(N, ring_power(), 1, 0.05).times))
        low = sum(LevelTimes(LogitNormal(), ResolutionSchedule(N, ring_power(), 1, 0.05)).levels)
        assert abs(low / GROUP - float(mass)) <= 0.5 / GROUP

    def test_the_expected_loss_is_that_of_the_sampler(self):
        """Of a function of t: the mean with weights, and that of times drawn as ever."""
        times = LevelTimes(LogitNormal(), ResolutionSchedule(N, ring_power(), 2))
        t, weight = times.sample(self.rng(2**16)), times.weight(2**16)
        plain = LogitNormal().sample(self.rng(2**16))
        assert float((weight * (3 * t).exp()).mean()) == pytest.approx(float((3 * plain).exp().mean()), rel=0.01)

    def test_parts_of_a_batch_draw_what_the_whole_batch_draws(self):
        times = LevelTimes(LogitNormal(), ResolutionSchedule(N, ring_power(), 2))
        whole = times.sample(self.rng(64))
        parts = [times.sample(CounterRNG(0, 0, torch.arange(start, start + 16))) for start in (0, 16, 32, 48)]
        assert torch.equal(whole, torch.cat(parts))

    def test_a_batch_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match="no multiple of 8"):
            LevelTimes(LogitNormal(), ResolutionSchedule(N, ring_power())).weight(12)


def small_net(levels: int) -> JiT:
    torch.manual_seed(0)
    return JiT(
        N, 4, 3, 3, 32, 2, 2, num_classes=5, bottleneck_dim=8, in_context_len=2, in_context_start=1, levels=levels
    )


class TestNetwork:
    def test_all_other_weights_are_those_of_a_network_without_levels(self):
        plain, levels = small_net(0).state_dict(), small_net(2).state_dict()
        assert all(torch.equal(levels[name], value) for name, value in plain.items())
        assert {name.split(".")[0] for name in levels.keys() - plain.keys()} == {"levels"}

    def test_positions_are_those_of_the_middles_of_tokens_in_the_whole_image(self):
        coarse = sincos_position_embedding(64, 4, 1)[0].view(4, 4, 64)
        place = torch.tensor([0.5, 2.5, 4.5, 6.5])
        torch.testing.assert_close(coarse[0, :, 0], place.sin())  # of the column, at the frequency 1
        torch.testing.assert_close(coarse[:, 0, 32], place.sin())  # of the row
        cos, sin = (table.view(4, 4, 8) for table in rope_table(16, 4, 1))
        torch.testing.assert_close(torch.atan2(sin[:, 0, 0], cos[:, 0, 0]), (place + math.pi) % (2 * math.pi) - math.pi)

    def test_layers_of_a_level_start_as_those_of_the_whole_image(self):
        """A patch of one colour is embedded, and predicted, as one of the same colour in the whole image."""
        net = small_net(1)
        torch.nn.init.normal_(net.final_layer.linear.weight)
        net.reset_levels()
        schedule, level = ResolutionSchedule(N, ring_power()), net.levels[0]
        x = torch.rand(1, 3, 1, 1).expand(1, 3, N, N)
        torch.testing.assert_close(level.x_embedder(schedule.reduce(x, 1)), net.x_embedder(x)[:, :4])
        tokens, c = torch.randn(1, 4, 32), torch.randn(1, 32)
        torch.testing.assert_close(level.final_layer(tokens, c), 2 * net.final_layer(tokens, c))

    def test_another_size_is_refused(self):
        with pytest.raises(ValueError, match="built for 16x16 or 8x8 images, got 4x4"):
            small_net(1)(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        with pytest.raises(ValueError, match="multiple of 32, the patch size 4 at level 3"):
            small_net(3)


class TestDenoiser:
    def denoiser(self, operator=None, **kwargs) -> Denoiser:
        net = small_net(2)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return Denoiser(net, operator, resolution=ResolutionSchedule(N, ring_power(), 2), **kwargs)

    @pytest.mark.parametrize("operator", [None, "spectral_forcing"])
    def test_a_batch_of_all_levels_gives_what_each_sample_gives_alone(self, operator):
        denoiser = self.denoiser(SpectralForcing(N) if operator else None)
        first, second = denoiser.resolution.times
        t = torch.tensor([first + 0.1, second / 2, (first + second) / 2, second / 3, 0.99])
        z, y = torch.randn(5, 3, N, N), torch.tensor([0, 1, 2, 3, 5])
        together = denoiser.velocity(z, t, y)
        alone = torch.cat([denoiser.velocity(z[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)

    def test_spectral_forcing_acts_with_its_cutoff_on_the_grid_of_the_level(self):
        """What a level sees is its band of SF_t(z): the same mask on the modes that it has."""
        forcing, schedule = SpectralForcing(N), ResolutionSchedule(N, ring_power())
        z, t = torch.randn(1, 3, N, N), torch.tensor([0.3])
        seen = schedule.reduce(forcing(z, t), 1)
        modes = separable_transform(dct_matrix(8).float(), schedule.reduce(z, 1)) * forcing.mask(t)[:, :8, :8]
        torch.testing.assert_close(seen, separable_transform(dct_matrix(8).float().T, modes))

    def test_the_weighted_loss_trains_the_layers_of_all_levels(self):
        denoiser = self.denoiser()
        times = LevelTimes(LogitNormal(), denoiser.resolution)
        s = sample_step(CounterRNG(0, 0, torch.arange(16)), torch.zeros(16).long(), (3, N, N), times, 0.1, 5)
        x = torch.rand(16, 3, N, N) - 0.5
        loss = denoiser(x, s.y, s.t, s.noise, s.level, s.weight)
        error = denoiser.residual(x, s.y, s.t, s.noise).square().mean((1, 2, 3))
        torch.testing.assert_close(loss, (s.weight * error).mean())
        loss.backward()
        assert all(float(p.grad.abs().sum()) > 0 for name, p in denoiser.named_parameters() if "levels" in name)

    def test_settings_that_cannot_work_are_refused(self):
        for arguments, words in [
            ((12, ring_power(12), 3), "3 levels do not fit 12 pixels"),
            ((512, ring_power(512), 8), "7 are the most"),
            ((N, ring_power(), 1, 0.0), "delta 0.0"),
            ((N, ring_power()[:-1]), "rings of DCT modes were expected"),
            ((N, -ring_power()), "negative powers"),
        ]:
            with pytest.raises(ValueError, match=words):
                ResolutionSchedule(*arguments)
