"""Paper Figure 22: out-of-distribution scores of harmful prompts from activations.

    python scripts/plot_detection.py OUT/experiments/clinic_tax.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.plotting import plot
from hhjax.analysis.policies import detection_figure, load_detections

if __name__ == "__main__":
    plot(detection_figure, "detection", __doc__, load_detections)
