"""The claims of the paper and of this project, with their directions, as registered before the runs: docs/claims.md."""

from spectreg_lab.statistics.claims import (
    BASELINES,
    METHODS,
    Above,
    Claim,
    Correlates,
    Exceeds,
    MoreWithBatch,
    Nearer,
    Predicts,
    WithBatch,
    described,
)
from spectreg_lab.statistics.quantities import through

ENOUGH = 0.95  # "all of them exceeds 95%", Section 4.1
AS_WELL = 0.01  # of training accuracy: so much less still counts as fitting as well
ADEQUATE = 0.05  # of the exact σ: so much may the estimate differ from it
SMALL, LARGE = (0,), (-1,)
SPECTRAL, OTHERS = ("spectral",), ("vanilla", "adversarial")
SIDES = {"train": "training data", "test": "test data"}
ACCURACY, GAP = "test_accuracy", "generalization_gap"
SHARE = (0.0, 1.0)
BEST = "Large batch: spectral has the best accuracy."

PAPER = (
    Claim(
        "4.1",
        "Small batch: decay and spectral have better test accuracy than vanilla and adversarial.",
        (Above(ACCURACY, ("decay", "spectral"), OTHERS, SMALL),),
    ),
    Claim("4.1", BEST, (Above(ACCURACY, SPECTRAL, BASELINES, LARGE),)),
    Claim("4.1", "Test accuracy falls as the batch grows.", (WithBatch(ACCURACY, METHODS, -1),)),
    Claim(
        "4.1",
        "It falls less for spectral than for the other methods.",
        (MoreWithBatch(ACCURACY, BASELINES, "spectral", -1),),
    ),
    Claim(
        "4.1",
        "Spectral has the smallest generalization gap at α, the DenseNet on STL-10 excepted.",
        (Above(GAP, BASELINES, SPECTRAL),),
        but_for_stl10=True,
    ),
    Claim(
        "4.1",
        "Decay has the next smallest, with the same exception.",
        (Above(GAP, OTHERS, ("decay",)),),
        but_for_stl10=True,
    ),
    Claim("4.1", "The gap of decay after the last epoch grows with the batch.", (WithBatch("gap", ("decay",), 1),)),
    Claim("4.1", "It grows more for decay than for spectral.", (MoreWithBatch("gap", ("decay",), "spectral", 1),)),
    Claim(
        "4.1",
        "Every method exceeds 95 % training accuracy in both regimes.",
        (Exceeds("train_accuracy", METHODS, ENOUGH, bounds=SHARE),),
    ),
    Claim(
        "4.2",
        "Through training, the gradient norm on test data rises.",
        (Correlates(through("input_gradient_test", "epoch")),),
    ),
    Claim(
        "4.2",
        "The gradient norm on training data falls.",
        (Correlates(through("input_gradient_train", "epoch"), sign=-1),),
    ),
    Claim(
        "4.2",
        "The gradient norm on test data rises with the gap.",
        (Correlates(through("input_gradient_test", "gap")),),
    ),
    Claim(
        "4.2",
        "It does so more than the gradient norm on training data, the DenseNet on STL-10 left out.",
        (Correlates(through("input_gradient_test", "gap"), more_than=through("input_gradient_train", "gap")),),
        but_for_stl10=True,
    ),
    Claim(
        "4.2",
        "Spectral reduces the gradient norm on test data (against vanilla).",
        (Above("log_input_gradient_test", ("vanilla",), SPECTRAL),),
    ),
    Claim(
        "4.2",
        "It does so at any point: on training data, too.",
        (Above("log_input_gradient_train", ("vanilla",), SPECTRAL),),
    ),
    Claim(
        "4.2",
        "Spectral fits the training data better than decay.",
        (Above("train_accuracy", SPECTRAL, ("decay",)),),
    ),
    Claim(
        "4.3",
        "Vanilla: the largest eigenvalue of the Hessian on training data grows with the batch.",
        (WithBatch("log_hessian_train", ("vanilla",), 1),),
    ),
    Claim("4.3", "So does that on test data.", (WithBatch("log_hessian_test", ("vanilla",), 1),)),
    *(
        claim
        for side, data in SIDES.items()
        for claim in (
            Claim(
                "4.3",
                f"Regularized models have larger eigenvalues than vanilla ({data}).",
                (Above(f"log_hessian_{side}", ("decay", "adversarial", "spectral"), ("vanilla",)),),
            ),
            Claim(
                "4.3",
                f"Spectral has the largest eigenvalue ({data}).",
                (Above(f"log_hessian_{side}", SPECTRAL, BASELINES),),
            ),
        )
    ),
    Claim(
        "4.3",
        "Over methods and regimes, the gradient norm on test data predicts the gap better than the eigenvalue does.",
        (Predicts("input_gradient_test", "hessian_train"),),
    ),
    Claim(
        "4.4",
        "The spectra of spectral are flatter than those of every other method.",
        (Above("log_skew", BASELINES, SPECTRAL),),
    ),
    Claim(
        "4.4",
        "Adversarial and decay shrink the spectra of vanilla.",
        (Above("log_frobenius", ("vanilla",), ("decay", "adversarial")),),
    ),
    Claim(
        "4.4",
        "They keep the skewed shape: nearer in skew to vanilla than to spectral.",
        (Nearer("log_skew", ("decay", "adversarial"), to="vanilla", than="spectral"),),
    ),
    Claim("4.4", "Spectral has the lowest largest singular values.", (Above("log_largest", BASELINES, SPECTRAL),)),
    Claim(
        "A",
        "In every setting, spectral has the smallest generalization gap or the best test accuracy.",
        (Above(ACCURACY, SPECTRAL, BASELINES), Above(GAP, BASELINES, SPECTRAL)),
    ),
)
OURS = (
    Claim(
        "ours",
        "One power iteration a step is adequate: through training, σ as estimated differs from the exact one by less "
        "than 5 %, in the worst weight of each epoch.",
        (Exceeds("misjudged", SPECTRAL, ADEQUATE, sign=-1, bounds=SHARE),),
    ),
    Claim(
        "ours",
        "What spectral gains is not bought by fitting less: its training accuracy is within 1 % of vanilla's.",
        (Above("train_accuracy", SPECTRAL, ("vanilla",), margin=AS_WELL),),
    ),
    Claim(
        "ours",
        "Random perturbations of test images move the outputs of spectral less than those of vanilla.",
        (Above("log_stretch_random", ("vanilla",), SPECTRAL),),
    ),
    Claim(
        "ours",
        "So do those that projected gradient ascent finds.",
        (Above("log_stretch_pgd", ("vanilla",), SPECTRAL),),
    ),
    Claim(
        "ours",
        "Spectral keeps more test accuracy than vanilla under those of projected gradient ascent.",
        (Above("accuracy_pgd", SPECTRAL, ("vanilla",)),),
    ),
    Claim(
        "ours",
        "The local Jacobians of spectral at test images are smaller than those of vanilla.",
        (Above("log_local", ("vanilla",), SPECTRAL),),
    ),
    Claim(
        "ours",
        "The product of the layers' norms bounds every local Jacobian.",
        (Exceeds("log_loose", METHODS, 0.0),),
    ),
    Claim(
        "ours",
        "It bounds them more closely for spectral than for vanilla.",
        (Above("log_loose", ("vanilla",), SPECTRAL),),
    ),
)
CLAIMS = (*PAPER, *OURS)


def table() -> str:
    """The claims as docs/claims.md has them, in Markdown."""
    rows = [
        f"| {claim.section} | {claim.sentence} | {'<br>or '.join(f'`{said}`' for said in described(claim))} |"
        for claim in CLAIMS
    ]
    return "\n".join(["| section | claim | says |", "|---|---|---|", *rows])
