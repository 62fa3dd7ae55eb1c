"""A trained network outside the training system: at one lambda, or with lambda as an input, in plain operators.

folded = fold_network(network, 0.3)           lambda and norms folded into the weights; folded(x)
served = with_lambda(network)                 lambda as an input; served(x, lam_N)
export_model("runs/<run>", 0.3, "onnx")       a file that other programs load
model = load("runs/<run>")                    model(x, lam)
"""

from oat_dist.deployment.exporting import FORMATS, export_model
from oat_dist.deployment.folding import fold_network
from oat_dist.deployment.lambda_input import with_lambda
from oat_dist.deployment.loading import LoadedModel, load

__all__ = ["FORMATS", "LoadedModel", "export_model", "fold_network", "load", "with_lambda"]
