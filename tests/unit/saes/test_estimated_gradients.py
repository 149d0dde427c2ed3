"""Gradients that by design are not the loss's own: of JumpReLU's thresholds, and around Gated SAEs' frozen decoder."""

import numpy as np
import torch

from universality.saes.gated import GatedSAE
from universality.saes.jumprelu import JumpReLUSAE
from universality.saes.settings import GatedSettings, JumpReLUSettings


def randomised(sae):
    torch.manual_seed(0)
    for parameter in sae.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return sae.train()


def numbers(sae):
    return {name: parameter.detach().double().numpy() for name, parameter in sae.named_parameters()}


def test_jumprelu_thresholds_get_the_papers_estimate():
    """Equations 11 and 12 of arXiv 2407.14435, with the loss's gradient in the codes worked out by hand."""
    settings = JumpReLUSettings(l0_coefficient=0.7, bandwidth=0.6, initial_threshold=0.5)
    sae = randomised(JumpReLUSAE(6, 15, settings))
    x = torch.randn(40, 6)
    for entries in (sae.sparse_entries(x), sae.dense_entries(x)):
        sae.zero_grad()
        sae.loss(x, x, entries, 0.5).loss.backward()
        p, inputs = numbers(sae), x.double().numpy()
        theta = np.exp(p["log_threshold"])
        pre = (inputs - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        codes = np.where((pre > theta) & (pre > 0), pre, 0)
        of_codes = 2 * (codes @ p["W_dec"] + p["b_dec"] - inputs) @ p["W_dec"].T / len(x)
        window = (np.abs(pre - theta) < 0.3) & (pre > 0)
        assert 20 < window.sum() < 400
        of_theta = -(window / 0.6 * (theta * of_codes + 0.7 * 0.5 / len(x))).sum(0)
        np.testing.assert_allclose(sae.log_threshold.grad, of_theta * theta, rtol=1e-3, atol=1e-5)
        of_pre = of_codes * (codes > 0)
        np.testing.assert_allclose(sae.b_enc.grad, of_pre.sum(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(sae.W_enc.grad, (inputs - p["b_dec"]).T @ of_pre, rtol=1e-3, atol=1e-5)


def test_gated_losses_reach_what_they_should():
    """The auxiliary term trains the gates, and neither decoder nor magnitudes; the penalty the gates alone."""
    sae = randomised(GatedSAE(6, 15, GatedSettings(l1_coefficient=0.7)))
    x = torch.randn(40, 6)
    for entries in (sae.sparse_entries(x), sae.dense_entries(x)):
        sae.zero_grad()
        step = sae.loss(x, x, entries, 0.5)
        step.loss.backward()
        p, inputs = numbers(sae), x.double().numpy()
        projection = (inputs - p["b_dec"]) @ p["W_enc"]
        gate = projection + p["b_enc"]
        magnitude = np.maximum(projection * np.exp(p["r_mag"]) + p["b_mag"], 0)
        codes, opened = magnitude * (gate > 0), np.maximum(gate, 0)
        error = codes @ p["W_dec"] + p["b_dec"] - inputs
        gate_error = opened @ p["W_dec"] + p["b_dec"] - inputs
        loss = (error**2).sum(1).mean() + (gate_error**2).sum(1).mean() + 0.7 * 0.5 * opened.sum(1).mean()
        np.testing.assert_allclose(step.loss.item(), loss, rtol=1e-5)
        of_codes, of_opened = 2 * error @ p["W_dec"].T / 40, 2 * gate_error @ p["W_dec"].T / 40 + 0.7 * 0.5 / 40
        np.testing.assert_allclose(sae.W_dec.grad, codes.T @ (2 * error / 40), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(sae.b_mag.grad, (of_codes * (codes > 0)).sum(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(sae.b_enc.grad, (of_opened * (gate > 0)).sum(0), rtol=1e-3, atol=1e-5)
