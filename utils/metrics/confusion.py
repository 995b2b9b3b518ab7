"""Which class is taken for which: boxes are matched whatever their class, then the classes are compared."""

import numpy as np

from utils.metrics.flat import FlatDetections, FlatTruths, overlapping_pairs

CONFIDENCE = 0.25
IOU_THRESHOLD = 0.45


def confusion_matrix(found: FlatDetections, truths: FlatTruths, num_classes: int) -> np.ndarray:
    """Count (predicted class, true class) over matched boxes.

    The pair of largest IoU in a picture is matched first, then the largest of the rest, and so on. Row ``num_classes``
    holds truths that nothing was matched to, the column of that number detections that match no truth; those on an
    ignored region are left out. YOLOv5 draws the same matrix at the same thresholds; its pass drops a detection whose
    favourite truth is gone, this one lets it have its next.

    Returns:
        int64 [C + 1, C + 1], row = predicted, column = true.
    """
    found = found[found.score >= CONFIDENCE]
    row, truth, overlap = overlapping_pairs(found, truths, found.image, truths.image, IOU_THRESHOLD)
    on_ignored = np.unique(row[truths.ignore[truth]])
    counts = ~truths.ignore[truth]
    row, truth, overlap = row[counts], truth[counts], overlap[counts]
    order = np.lexsort((truth, row, -overlap))
    row, truth = row[order], truth[order]

    predicted_as = np.full(len(truths), num_classes)
    match_of = np.full(len(found), num_classes)
    while len(row):  # pairs that are the favourite of both sides; at least one per round
        number = np.arange(len(row))
        best_of_row, best_of_truth = np.full(len(found), len(row)), np.full(len(truths), len(row))
        np.minimum.at(best_of_row, row, number)
        np.minimum.at(best_of_truth, truth, number)
        mutual = (best_of_row[row] == number) & (best_of_truth[truth] == number)
        predicted_as[truth[mutual]] = found.label[row[mutual]]
        match_of[row[mutual]] = truths.label[truth[mutual]]
        gone_rows, gone_truths = np.isin(row, row[mutual]), np.isin(truth, truth[mutual])
        row, truth = row[~(gone_rows | gone_truths)], truth[~(gone_rows | gone_truths)]

    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.add.at(matrix, (predicted_as[~truths.ignore], truths.label[~truths.ignore]), 1)
    stray = match_of == num_classes
    stray[on_ignored] = False
    np.add.at(matrix, (found.label[stray], num_classes), 1)
    return matrix
