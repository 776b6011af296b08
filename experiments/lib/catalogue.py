"""Every statement of the sources: its text, the acceptance of its experiment, the source, the script that shows it.

Sources: F. Dangel, "Structural implications of batch normalization" (D); a StackExchange thread on the derivatives of
BatchNorm's moments (S); the Wikipedia (W) and Grokipedia (G) articles on batch normalization; results beyond them (X).

Words: one BatchNorm channel has input y over m entries of the batch, mean μ, biased variance σ², s² = σ² + ε,
ŷ = (y - μ)/s, ρ = σ²/s², output γ ŷ + β, and M = I - 11ᵀ/m - ŷŷᵀ/m. V Vᵀ and Vᵀ V = G share their spectrum; K = N C.
Modes: *train* (derivatives through the batch statistics), *frozen* (same forward pass, statistics held constant),
*eval* (running statistics). All errors are relative and in float64 unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = {
    "D": "Dangel 2021 (note)",
    "S": "StackExchange thread on the moments' derivatives",
    "W": "Wikipedia, Batch normalization",
    "G": "Grokipedia, Batch normalization",
    "X": "beyond the sources",
}


@dataclass(frozen=True)
class Statement:
    """A claim, what its experiment must show, where it comes from; ``script`` is empty where no experiment applies."""

    id: str
    script: str
    text: str
    acceptance: str
    origin: str = ""

    @property
    def source(self) -> str:
        """Where the claim stands, and who first made it."""
        return SOURCES[self.id[0]] + (f"; {self.origin}" if self.origin else "")


_ALL = [
    # --- D: the note
    Statement(
        "D1", "coupling",
        "BatchNorm mixes samples in the forward pass: ∂F_n/∂x_k ≠ 0 for k ≠ n",
        "share of ‖∂F/∂X‖² off the diagonal: 0 exactly in eval mode; in train mode slope -0.94 ± 0.1 in log N",
    ),
    Statement(
        "D2", "structure",
        "The code is a family of functions, one per batch size n",
        "n = 1: clear error; n = 2 and ε = 0: ∂F/∂W below a BatchNorm < 1e-8; n = 2 and ε = 1e-5: > 1e-5",
    ),
    Statement(
        "D3", "structure",
        "Split into model and loss, L(F(X, θ), Y), without independence of samples",
        "Jᵀ (∇²_F L) J from the two parts = bncurv's GGN to 1e-10",
    ),
    Statement(
        "D4", "structure",
        "SIMD structure of the forward pass, F_n = f(x_n): lost with BatchNorm",
        "changing x_k moves F_n (k ≠ n): yes for BatchNorm in train mode, exactly no in eval mode, for GN, LN, none",
    ),
    Statement(
        "D5", "structure",
        "The loss reduces individual losses: L = R(ℓ_1 … ℓ_N)",
        "V(mean) √N = V(sum) and grad(mean) N = grad(sum) to 1e-12, BatchNorm or not",
    ),
    Statement(
        "D6", "structure",
        "SIMD loss: ∇²_F L is block-diagonal over samples",
        "off-block part 0 for cross-entropy and squared error, > 1e-3 for a contrastive loss, which bncurv refuses",
    ),
    Statement(
        "D7", "structure",
        "A ladder of structures, from a general loss to the usual graph (figures 1 and 2)",
        "N × N maps of ∂ℓ_n/∂x_k: diagonal without BatchNorm and in eval mode, dense in train mode",
    ),
    Statement(
        "D8", "per_sample",
        "Individual gradients exist if all boxes are checked: J_fᵀ ∂ℓ/∂f",
        "eval mode: ComponentGrad = BackPACK's BatchGrad to 1e-12",
    ),
    Statement(
        "D9", "per_sample",
        "With BatchNorm the same products give per-component gradients J_nᵀ ∂ℓ_n/∂F_n",
        "= rows of the Jacobian of the loss vector to 1e-12; path and frozen gradients differ below the last "
        "BatchNorm by > 30 %, above it by < 1e-12",
    ),
    Statement(
        "D10", "per_sample",
        "The mean of the per-component gradients is the gradient",
        "their sum is the gradient to 1e-12, for reduction sum and mean; frozen ones do not sum to it (> 30 % off)",
    ),
    Statement(
        "D11", "per_sample",
        "Interpretation of the variance of per-component gradients is unclear",
        "variance ÷ B against that of true mini-batch gradients, last layer: component < 0.85, influence in "
        "[0.85, 1.15], path (first layer) > 2",
    ),
    Statement(
        "D12", "structure",
        "G = Jᵀ (∇²_F L) J with a D × N C Jacobian needs the split only",
        "products of bncurv's G with 20 random vectors = double-backward GGN products to 1e-10",
    ),
    Statement(
        "D13", "structure",
        "G = Σ_n J_nᵀ H_n J_n, and each summand depends on all of X",
        "diagonals of the summands add up to that of G to 1e-12; replacing x_k changes summand n by > 1e-3",
    ),
    Statement(
        "D14", "structure",
        "The loss Hessian has a symmetric factor, H_n = Σ_c s_nc s_ncᵀ",
        "S Sᵀ = H to 1e-14 for cross-entropy and squared error; of rank C - 1 for cross-entropy",
    ),
    Statement(
        "D15", "coupling",
        "diag G by backpropagating the s_nc",
        "Σ_k (J_nᵀ s_nc)² = diagonal of Jᵀ H J to 1e-12; the three usual mistakes (own path of each sample, "
        "squares before the sum over samples, frozen statistics) are > 20 % off",
    ),
    Statement(
        "D16", "rank_nullspace",
        "rank G ≤ N C",
        "cross-entropy: rank exactly N (C - 1) at three stages of training, next eigenvalue < 1e-12 of the first",
    ),
    Statement(
        "D17", "rank_nullspace",
        "ViViT's tricks survive: the Gram matrix V Vᵀ has G's spectrum, e = Vᵀ u / √λ",
        "‖G e - λ e‖ / λ < 1e-8 for all kept pairs, Eᵀ E = I to 1e-8, traces equal to 1e-12; asking for more than "
        "the rank is refused",
    ),
    Statement(
        "D18", "coupling",
        "BatchNorm does not interfere with the computational trick: N C vectors backpropagated",
        "true, at O(N C) passes of the whole batch: exponent of the dense passes in N 1 ± 0.05; through the cut the "
        "passes do not depend on N; with one BatchNorm right behind the first layer C - 1 passes remain",
    ),
    Statement(
        "D19", "structure",
        "Per-component GGNs are hard to interpret, their sum is fine",
        "tr G_n for a fixed sample n varies with the other samples (relative std > 1 %); sum = tr G to 1e-12",
    ),
    # --- S: the thread
    Statement(
        "S1", "identities",
        "∂ℓ/∂σ² = Σ ∂ℓ/∂x̂_i (x_i - μ) (-1/2) (σ² + ε)^(-3/2)",
        "= autograd to 1e-13",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "S2", "identities",
        "∂ℓ/∂μ = -Σ ∂ℓ/∂x̂_i / √(σ² + ε) + ∂ℓ/∂σ² Σ -2 (x_i - μ) / m (the thread misplaces a parenthesis)",
        "= autograd to 1e-13; the second term is zero to 1e-14",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "S3", "identities",
        "∂ℓ/∂x_i = ∂ℓ/∂x̂_i / √(σ² + ε) + ∂ℓ/∂σ² 2 (x_i - μ) / m + ∂ℓ/∂μ / m",
        "= autograd to 1e-13; without the moments' derivatives > 50 % off",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "S4", "identities",
        "The moments are constant during an epoch",
        "wrong in train mode: ∂μ/∂θ and ∂σ²/∂θ ≠ 0; right only in eval mode, where the derivative is 0 exactly",
    ),
    Statement(
        "S5", "identities",
        "The moments are intermediate results: BatchNorm is one function of m inputs",
        "its Jacobian is (γ/s) M to 1e-14",
    ),
    Statement(
        "S6", "identities",
        "Two samples, mean only: dL/dy = (1, 1) gives dL/dm = 2, and dL/dx = 0 by a minus sign",
        "dL/dm = -2 and dL/dx = (0, 0) exactly: the thread's two sign errors cancel",
    ),
    Statement(
        "S7", "identities",
        "The same holds for the variance, with a more complicated demonstration",
        "ε = 0: the gradient is orthogonal to 1 and to ŷ to 1e-13; with two samples it is zero",
    ),
    Statement(
        "S8", "identities",
        "Why: with the mean held constant a bias runs away while the loss does not move",
        "200 steps: held constant |b| > 10 and loss change < 1e-12; through the mean |b| < 1e-12",
        "Ioffe & Szegedy 2015, section 2",
    ),
    Statement(
        "S9", "coupling",
        "The moments' derivatives are only used for the gradient towards the inputs",
        "wrong: they change curvature; frozen ÷ train > 1.5 in the trace and > 5 in λ_max of the GGN (raw digits)",
    ),
    # --- W: Wikipedia
    Statement(
        "W1", "identities",
        "The transform: x̂ = (x - μ)/√(σ² + ε), y = γ x̂ + β",
        "= torch's BatchNorm1d and 2d to 1e-12; mean(x̂²) = ρ to 1e-12: the variance is the biased one",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "W2", "identities",
        "Backpropagation through the transform, with γ and β",
        "formulas for x, γ, β = autograd through torch's BatchNorm1d to 1e-12",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "W3", "inference",
        "Inference: E[x] = E_B[μ_B], Var[x] = m/(m-1) E_B[σ_B²]",
        "4000 batches of m = 10 from N(0, 1): E_B[σ_B²] m/(m-1) within 1 ± 0.03; torch keeps the unbiased one",
    ),
    Statement(
        "W4", "inference",
        "At inference BatchNorm is affine",
        "folded into the layer below: outputs equal to 1e-12; diag GGN of the eval network = the chain rule's "
        "transform of the folded network's to 1e-10",
    ),
    Statement(
        "W5", "rank_nullspace",
        "A bias below BatchNorm is redundant",
        "its gradient and GGN diagonal are 0: < 1e-14 of the weights' in float64",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "W6", "identities",
        "BN((aW)u) = BN(Wu), ∂BN/∂u the same, ∂/∂(aW) = (1/a) ∂/∂W",
        "ε = 0: to 1e-12; ε = 1e-5: approximate only, off by > 1e-7 at a = 0.1",
        "Ioffe & Szegedy 2015, section 3.3",
    ),
    Statement(
        "W7", "covariate_shift",
        "BatchNorm reduces the shift of the distributions of layer inputs",
        "KL divergence of pre-activations to the start of training: BatchNorm < none ÷ 5 in every layer",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "W8", "covariate_shift",
        "Internal covariate shift as change of gradients: BatchNorm does not reduce it",
        "25-layer linear network, same initialisation: cos(G, G') with BatchNorm < without, in every seed",
        "Santurkar et al. 2018",
    ),
    Statement(
        "W9", "covariate_shift",
        "BatchNorm with injected noise (covariate shift) trains as well",
        "steps to 90 %: noisy BatchNorm ≤ 2 × BatchNorm, and < half of the best without",
        "Santurkar et al. 2018, figure 1",
    ),
    Statement(
        "W10", "per_sample",
        "Items are no longer iid, so the gradient estimate is worse",
        "bias of the mini-batch gradient, noise removed: slope in log B in [-1.25, -0.7]; without BatchNorm within "
        "3 standard errors of 0",
    ),
    Statement(
        "W11", "per_sample",
        "Outputs become random: they depend on the rest of the batch",
        "standard deviation of F(x_0) over random batches falls as B^(-1/2): slope -0.5 ± 0.15",
    ),
    Statement(
        "W12", "identities",
        "Gradient bound: ‖∇_y L̂‖² ≤ (γ²/σ²)(‖∇L‖² - <1, ∇L>²/m - <∇L, ŷ>²/m)",
        "an equality at ε = 0 to 1e-12; for ε > 0 exact with (2 - ρ) on the last term, and the bound holds",
        "Santurkar et al. 2018, theorem 4.1",
    ),
    Statement(
        "W13", "identities",
        "Hessian bound: vᵀ ∇²L̂ v ≤ (γ²/σ²) vᵀ ∇²L v - (γ/(m σ²)) <∇L, ŷ> ‖v‖² for v = ∇_y L̂",
        "an equality at ε = 0 to 1e-12; the full Hessian has a closed form for every ε, to 1e-12",
        "Santurkar et al. 2018, theorem 4.2",
    ),
    Statement(
        "W14", "smoothness",
        "Bound of the weights' worst-case gradient",
        "equality of the corrected form to 1e-12; the printed form is dimensionally inconsistent",
        "Santurkar et al. 2018, theorem 4.4",
    ),
    Statement(
        "W15", "smoothness",
        "BatchNorm's optimum lies nearer to the initialisation: ‖W_0 - Ŵ*‖² ≤ ‖W_0 - W*‖² - …",
        "an equality to 1e-12",
        "Santurkar et al. 2018, lemma 4.5",
    ),
    Statement(
        "W16", "smoothness",
        "A smoother landscape along the gradient: loss range, gradient change, effective β",
        "none ÷ BatchNorm: loss range > 10, gradient change > 4, β > 1.3",
        "Santurkar et al. 2018, figure 4",
    ),
    Statement(
        "W17", "spectrum_training",
        "Critique: a bound on λ_max says little, the whole spectrum is needed",
        "all N (C - 1) eigenvalues; at initialisation λ_max calls BatchNorm sharper than none, λ_1/λ_10 and the "
        "participation ratio call it flatter",
    ),
    Statement(
        "W18", "covariate_shift",
        "Covariate shift measured by the correlation of gradients before and after updates",
        "norm and cosine of G - G' computed as defined; both rank BatchNorm as not lower (as W8)",
        "Santurkar et al. 2018, definition 2.1",
    ),
    Statement(
        "W19", "explosion",
        "Gradients explode with depth whatever the nonlinearity: ‖∇W_1‖ > c λ^L, λ > 1",
        "ReLU, width and batch 256: norm grows by 1.18 … 1.23 per layer (theory √(π/(π-1)) = 1.211); faster in "
        "smaller batches; without BatchNorm < 1.05",
        "Yang et al. 2019",
    ),
    Statement(
        "W20", "explosion",
        "For linear networks too",
        "squared norm per layer = (B-2)/(B-3) within 1 % at B = 8, 16, 32",
        "Yang et al. 2019",
    ),
    Statement(
        "W21", "explosion",
        "Deep BatchNorm networks are practically untrainable, skip connections relieve",
        "first ÷ last gradient norm: 60 residual blocks < 50, 90 plain layers > 1e6",
        "Yang et al. 2019",
    ),
    Statement(
        "W22", "explosion",
        "One BatchNorm smooths, a stack explodes: no contradiction",
        "one layer's Jacobian has singular values γ/s and two zeros; the norm of the product over layers grows",
    ),
    Statement(
        "W23", "ols_bn",
        "Length and direction are decoupled",
        "<w, ∇_w L> = 0 and ‖w_(t+1)‖² = ‖w_t‖² + η² ‖∇‖² to 1e-12",
        "Kohler et al. 2019",
    ),
    Statement(
        "W24", "ols_bn",
        "Least squares with BatchNorm converges linearly: ρ_t - ρ* ≤ (1 - μ/L)^(2t) (ρ_0 - ρ*)",
        "the bound holds at all steps, on random and on real data; its side identity to 1e-12",
        "Kohler et al. 2019",
    ),
    Statement(
        "W25", "ols_bn",
        "Plain gradient descent is only sub-linear there",
        "wrong for S > 0: with step 1/L its rate is (1 - μ/L)² to 1e-4",
    ),
    Statement(
        "W26", "ols_bn",
        "Rate of the generalised Rayleigh quotient, with the eigenvalues of B alone",
        "holds for A = I; for a rank-one B the printed factor is 0, which the measured rate contradicts",
        "Knyazev & Neymeyr 2003",
    ),
    Statement(
        "W27", "halfspace_gdnp",
        "Learning halfspaces: ∇f = c_1 u + c_2 S w̃",
        "quadrature against 2·10⁶ samples: all |z| < 4; against finite differences 1e-6",
        "Kohler et al. 2019",
    ),
    Statement(
        "W28", "halfspace_gdnp",
        "Bounded critical points lie on a line: w̃ = g S⁻¹ u",
        "|cos(w, S⁻¹ u)| of GDNP's end point > 1 - 1e-10",
        "Kohler et al. 2019",
    ),
    Statement(
        "W29", "halfspace_gdnp",
        "GDNP converges linearly",
        "ρ_t - ρ* ≤ (1 - μ/L)^(2t) (ρ_0 - ρ*) at every t; gradient at t = 100 smaller than plain descent's",
        "Kohler et al. 2019",
    ),
    Statement(
        "W30", "halfspace_gdnp",
        "Bisection halves the error: squared derivative ≤ 2^(-T_s) …",
        "slope of log2 |∂_g f| per step -1 ± 0.1: linear in the norm itself, so the squared bound is loose",
        "Kohler et al. 2019",
    ),
    Statement(
        "W31", "halfspace_gdnp",
        "One hidden layer of tanh: critical points w̃_i = c_i S⁻¹ u",
        "gradient lies in span{u, S w_j} to 4 standard errors; with other units fixed a unit's optimum is not on the "
        "line (cos < 0.99): the claim needs joint criticality",
        "Kohler et al. 2019",
    ),
    Statement("W32", "", "The exact mechanism of BatchNorm is debated", "documentation only"),
    # --- G: Grokipedia
    Statement(
        "G1", "rank_nullspace",
        "BatchNorm is placed behind W u (+ b), before the nonlinearity; b is redundant",
        "without b the rank of the GGN is the same and its non-zero spectrum equal to 1e-10",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "G2", "identities",
        "Applied post-activation, BatchNorm normalises the pre-activation",
        "contradicts itself: before the activation pre-activations are standardised to 1e-3, behind it they are not",
    ),
    Statement(
        "G3", "rank_nullspace",
        "Convolutions: moments over m' = m p q entries per channel",
        "= a BatchNorm1d on the m p q rows to 1e-12; null space of a conv network predicted and counted: equal",
    ),
    Statement(
        "G4", "identities",
        "The backward formulas; the second term of ∂ℓ/∂μ is zero",
        "second term < 1e-14 and leaving it out changes nothing to 1e-13, as long as σ² uses its own mean",
    ),
    Statement(
        "G5", "coupling",
        "The backward pass of BatchNorm costs O(m d)",
        "numbers read and written by its formulas: exponent 1 ± 0.1 in m and in d",
    ),
    Statement(
        "G6", "inference",
        "Running statistics: momentum · old + (1 - momentum) · batch, momentum 0.9 or 0.99",
        "Keras' convention; torch has (1 - momentum) · old + momentum · batch with 0.1: running mean = 0.1 · mean "
        "after one step",
    ),
    Statement(
        "G7", "inference",
        "Population variance by the factor m/(m-1)",
        "torch's running variance of one batch (momentum 1) = m/(m-1) σ² to 1e-12",
    ),
    Statement(
        "G8", "norm_zoo",
        "Small batches and single samples are a problem; LayerNorm is an alternative",
        "N = 1: BatchNorm raises, LN and GN give the same output as in a batch to 1e-12",
    ),
    Statement(
        "G9", "per_sample",
        "The noise of the batch regularises",
        "noise shown (W11); its variance is proportional to 1/B: exponent -1 ± 0.3",
    ),
    Statement(
        "G10", "smoothness",
        "14 times fewer steps to the same accuracy",
        "analogue: steps to 90 % on digits, best learning rates: ≥ 4 times fewer",
        "Ioffe & Szegedy 2015",
    ),
    Statement(
        "G11", "covariate_shift",
        "Distributions of a sigmoid network's activations are stable with BatchNorm",
        "drift of a unit's median over training: BatchNorm ÷ none < 0.3",
        "Ioffe & Szegedy 2015, figure 1",
    ),
    Statement(
        "G12", "covariate_shift",
        "Distributions stabilised without BatchNorm do not accelerate training",
        "inverted: Santurkar et al. de-stabilised BatchNorm, and it still trained (as W9)",
        "Santurkar et al. 2018",
    ),
    Statement(
        "G13", "", "Reducing internal covariate shift is essential and sufficient", "documentation only", "Rauf 2020"
    ),
    Statement(
        "G14", "smoothness",
        "A smaller Lipschitz constant allows ten times larger learning rates",
        "best learning rate with BatchNorm ≥ 3 times the best without",
        "Bjorck et al. 2018",
    ),
    Statement(
        "G15", "norm_zoo",
        "BatchNorm preconditions: curvature becomes isotropic",
        "over-read: participation ratio > 3 times that of the others (raw pixels), yet < 1/3 of the rank",
        "Bjorck et al. 2018",
    ),
    Statement("G16", "", "Representations cluster under BatchNorm (2025)", "documentation only"),
    Statement(
        "G17", "smoothness",
        "The gradient bound shows a smaller condition number of the Hessian",
        "the bound holds with equality; the condition number does not follow: a counter-example is shown",
        "Santurkar et al. 2018",
    ),
    Statement(
        "G18", "smoothness",
        "Variation of the loss is reduced by up to two orders of magnitude",
        "loss range none ÷ BatchNorm > 10",
        "Santurkar et al. 2018",
    ),
    Statement(
        "G19", "covariate_shift",
        "KL divergence between layer distributions as measure of shift",
        "Gaussian-fit KL: BatchNorm < none ÷ 5",
    ),
    Statement(
        "G20", "covariate_shift",
        "Covariate shift as the L2 norm of differences of mean and deviation",
        "not Santurkar's definition: the two measures disagree on whether BatchNorm reduces shift",
    ),
    Statement(
        "G21", "explosion",
        "Without BatchNorm gradients vanish like exp(-c depth)",
        "depends on the initialisation: He's keeps the norm within 5 % per layer, a smaller one vanishes",
    ),
    Statement(
        "G22", "explosion",
        "Singular values of the Jacobian cluster around 1",
        "one BatchNorm: all γ/s, two zeros; product of Linear-BN-ReLU: spread grows with depth",
    ),
    Statement(
        "G23", "identities",
        "∂L/∂x ≈ (∂L/∂y)/σ",
        "drops M: > 50 % off",
    ),
    Statement(
        "G24", "explosion",
        "In 90 layers gradient norms may increase",
        "first ÷ last within a factor 5 of 1.2112^89",
    ),
    Statement(
        "G25", "explosion",
        "Residual networks with more than 100 layers are fine",
        "60 blocks: first ÷ last < 50",
    ),
    Statement(
        "G26", "ols_bn",
        "BN(W x) ≈ γ W x/‖W x‖ + β; the scale is γ ‖W‖",
        "wrong: per unit γ wᵀx/‖w‖_S; the output's deviation is γ √ρ whatever ‖w‖, to 1e-12",
    ),
    Statement(
        "G27", "karakida",
        "BatchNorm reduces λ_max of the Fisher matrix",
        "only in the last layer (ReLU): slope of log λ_max in log width, last < 0.15, hidden > 0.6",
        "Karakida et al. 2019",
    ),
    Statement(
        "G28", "ols_bn",
        "Least squares: BatchNorm before the linear map, rate 1 - 1/κ, 2 to 5 times fewer epochs",
        "garbled: behind w'x any learning rate converges (1e-2 … 1e2), plain descent diverges above 2/λ_max",
        "Cai et al. 2019",
    ),
    Statement(
        "G29", "halfspace_gdnp",
        "Halfspaces: hinge loss, separable data, SGD, strongly convex after BatchNorm",
        "wrong on four counts; along the direction f is not convex (a negative second derivative is shown)",
        "Kohler et al. 2019",
    ),
    Statement(
        "G30", "norm_zoo",
        "NTK: BatchNorm moves the network towards the chaotic regime",
        "share of the constant mode at depth 20: BatchNorm < 0.03 < 0.15 < none",
        "Jacot et al. 2019",
    ),
    Statement("G31", "", "CIFAR-10: 90 % in under 100 epochs; > 90 % of leaderboard entries", "documentation only"),
    # --- X: beyond the sources
    Statement(
        "X1", "spectrum_training",
        "Exact spectra over training in train, frozen and eval mode and without BatchNorm",
        "at init and step 20 λ_max(eval)/λ_max(train) > 5, λ_1/λ_10 (none) > 5 × (train) at init; gradient's share in "
        "the leading 9 directions at step 20, mean of the seeds: train < 0.35, eval > 0.7",
        "Ghorbani et al. 2019",
    ),
    Statement(
        "X2", "norm_zoo",
        "Participation ratio tr(K)²/tr(K²) of BN, LN, GN, none",
        "min over seeds of BatchNorm's > 3 × max of the others'",
    ),
    Statement(
        "X3", "per_sample",
        "Which per-sample gradient? Influence gradients agree with leave-one-out",
        "leave-one-out error of influence gradients: slope in log N < -0.8 and < 0.01 at N = 256; of components > 0.1",
    ),
    Statement(
        "X4", "karakida",
        "Growth of λ_max with width, by place of the BatchNorm",
        "log-log slope: none and hidden > 0.6, last < 0.15",
        "Karakida et al. 2019",
    ),
    Statement(
        "X5", "coupling",
        "Coupling vanishes in ∂F/∂X but not in curvature",
        "hidden ReLU layer, width 256, Gaussian inputs: naive ÷ full trace within 0.03 of π/(π-1) = 1.467; the "
        "diagonal's error of ignoring coupling does not fall with N (largest N > half of N = 8); exactly 1 behind "
        "the last BatchNorm",
    ),
    Statement(
        "X6", "mc_diag",
        "Monte-Carlo diagonal: one whole-batch pass per draw, unbiased",
        "|z| < 4 on 20 entries; RMSE falls as 1/√draws (within 25 %); variance per pass at least 3 times below that of "
        "per-component draws",
    ),
    Statement(
        "X7", "laplace_approximation",
        "Laplace approximation in train mode",
        "log det by the Gram matrix = by the parameters to 1e-8; posterior variance of a bias below BatchNorm = prior "
        "to 1e-12; along the radial direction = prior to 1e-6 in train mode and < 0.99 frozen",
    ),
    Statement(
        "X8", "edge_of_stability",
        "The edge of stability needs train-mode curvature",
        "second half of training: mean λ_max of the train-mode GGN within 12 % of 2/lr, frozen > 5 × as large",
        "Cohen et al. 2021",
    ),
    Statement(
        "X9", "quadratic_model",
        "A damped Gauss-Newton step keeps its promise in train mode only",
        "actual ÷ predicted decrease: train in [0.8, 1.2], frozen < 0.5",
    ),
    Statement(
        "X10", "quadratic_model",
        "Hessian block = GGN block of piecewise-linear networks: broken by BatchNorm",
        "gap of the weights' block > 0.05 in train mode, < 1e-12 in eval mode; blocks of the last layer, γ and β "
        "< 1e-12 in both",
    ),
    Statement(
        "X11", "mc_diag",
        "Mini-batches bias curvature",
        "E_B tr G_B ÷ tr G - 1 falls with B (slope in [-1.5, -0.6], > 5 % at B = 8); without BatchNorm 0 to "
        "1e-12 over whole shuffles",
    ),
    Statement(
        "X12", "spectrum_training",
        "Sharpness depends on the batch size with BatchNorm only",
        "λ_max at N = 16 ÷ N = 256: BatchNorm > 1.5, none within 1 ± 0.2",
    ),
    Statement(
        "X13", "rank_nullspace",
        "Symmetries as a lint: null space predicted from the module graph",
        "MLP (21) and conv network (89), ε = 0 and 1e-5: count equals D - rank, and |V b|/(|V| |b|) < 1e-12 for every "
        "predicted vector; frozen: the same count, but the basis fails (> 1e-3)",
    ),
    Statement(
        "X14", "ols_bn",
        "Rate of BatchNorm's gradient descent predicted from the GGN block",
        "measured = predicted to 1e-4; κ* ≤ κ",
        "Cai et al. 2019",
    ),
    Statement(
        "X15", "spectrum_training",
        "Exact train-mode spectrum of a CIFAR-size ResNet",
        "on a GPU: spectrum of sub-sampled components; trace = the Monte-Carlo diagonal's within 4 standard errors",
    ),
    Statement(
        "X16", "real_data",
        "The same on other real data: breast cancer, wine, diabetes",
        "ranks N(C-1), N(C-1), N C; components sum to the gradient to 1e-12; coupling > 20 %; quadratic model as X9",
    ),
    Statement(
        "X17", "mode_matters",
        "Does BatchNorm flatten or sharpen? It depends on the mode one measures in",
        "3 seeds, two depths, end of training: λ_max(eval) > λ_max(none) > λ_max(train)",
        "against Yao et al. 2020",
    ),
]  # fmt: skip

CATALOGUE = {statement.id: statement for statement in _ALL}

# Statements to which no experiment applies: verdict and why.
DOCUMENTED = {
    "W32": (
        "not testable here",
        "A statement about the literature. These experiments add: which matrix one looks at (train, frozen, eval) "
        "decides the answer (X1, X8, X9, X17).",
    ),
    "G13": (
        "not testable here",
        "Disputed in the literature; 'essential and sufficient' names no measurable quantity. W7 and W8 show that two "
        "measures of covariate shift disagree.",
    ),
    "G16": ("not testable here", "A citation of 2025 without a claim precise enough to measure; unchecked."),
    "G31": ("not testable here", "Numbers without a source, on data and hardware that do not belong here."),
}
