"""Table 1 and every figure: which runs, which reduction, the paper's value beside it."""

from spectreg_lab.exhibits.exhibit import Exhibit
from spectreg_lab.figures import curvature, curves, jacobian, layers, perturbation, sensitivity, sigma, spectra
from spectreg_lab.statistics import frames, quantities, verdicts
from spectreg_lab.storage.store import StudyRecord
from spectreg_lab.tables import correlations, cost, fit, runs, search, table1


def exhibits(study: StudyRecord) -> list[Exhibit]:
    """Every exhibit of a study, in the order of the page."""
    epochs, points = frames.epochs(study), frames.runs(study)
    values = table1.values(study, epochs, points)
    table = table1.frame(study, values)
    numbers = quantities.numbers(study, values, epochs)
    return [
        verdicts.exhibit(study, numbers, table),
        table1.exhibit(study, table, values),
        fit.exhibit(study, points),
        curves.exhibit(study, epochs),
        sensitivity.exhibit(study, epochs, points),
        curvature.exhibit(study, epochs, points),
        correlations.exhibit(study, correlations.values(study, points)),
        spectra.exhibit(study, spectra.values(study)),
        sigma.exhibit(study, sigma.values(study)),
        perturbation.exhibit(study, perturbation.values(study)),
        jacobian.exhibit(study, jacobian.values(study)),
        layers.exhibit(study, layers.values(study)),
        cost.exhibit(study, points),
        search.exhibit(study, search.values(study)),
        runs.exhibit(study, points),
    ]
