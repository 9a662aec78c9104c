"""Tasks: losses, metrics and pictures, one file per task."""

from jbn.training.tasks.gan import GAN as GAN
from jbn.training.tasks.supervised import Supervised as Supervised
from jbn.training.tasks.task import Task as Task
