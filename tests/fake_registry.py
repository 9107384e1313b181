"""A registry in memory that can end its process after any write, for tests of what writes to it."""

from multilora.registry import AdapterVersion, RunRecord


class Killed(BaseException):
    """The controller's process ends here."""


class FakeRegistry:
    """Keeps runs, versions and aliases; ends the process right after write number `kill_at`."""

    def __init__(self):
        self.runs, self.versions, self.aliases, self.metrics, self.reports = {}, {}, {}, {}, {}
        self.params, self.points, self.ended = {}, {}, {}
        self.num_writes, self.kill_at = 0, None

    def _written(self):
        self.num_writes += 1
        if self.num_writes == self.kill_at:
            raise Killed

    def find_run(self, task, run_key):
        tags = self.runs.get(f"{task}-{run_key}")
        return None if tags is None else RunRecord(f"{task}-{run_key}", task, run_key, tags.get("status", ""), dict(tags), {})

    def start_run(self, task, run_key, params, tags):
        self.runs[f"{task}-{run_key}"], self.params[f"{task}-{run_key}"] = dict(tags), dict(params)
        self._written()
        return self.find_run(task, run_key)

    def set_tags(self, run_id, tags):
        self.runs[run_id].update(tags)
        self._written()

    def log_params(self, run_id, params):
        known = self.params[run_id]
        assert all(known.get(name, value) == value for name, value in params.items()), "MLflow refuses another value"
        known.update(params)
        self._written()

    def end_run(self, run_id, is_ok):
        self.ended[run_id] = is_ok
        self._written()

    def log_metrics(self, run_id, points):
        self.metrics |= {name: value for name, value, _, _ in points}
        self.points.setdefault(run_id, []).extend(points)

    def log_texts(self, run_id, texts):
        pass

    def version_of_run(self, run):
        return next((version for version in self.versions.values() if version.run_id == run.run_id), None)

    def register(self, run, adapter_dir, digest, model_code, description, tags):
        if self.version_of_run(run) is None:
            number = len(self.versions) + 1
            self.versions[number] = AdapterVersion(run.task, number, digest, run.run_id, dict(tags))
            self._written()
        return self.version_of_run(run)

    def tag_version(self, version, tags):
        self.versions[version.version].tags.update(tags)
        self._written()

    def describe_version(self, version, description):
        self._written()

    def set_alias(self, version, alias):
        self.aliases[version.task, alias] = version.version
        self._written()

    def drop_alias(self, task, alias):
        self.aliases.pop((task, alias), None)
        self._written()

    def by_alias(self, task, alias):
        return self.versions.get(self.aliases.get((task, alias)))

    def champions(self):
        return {task: self.versions[number] for (task, alias), number in self.aliases.items() if alias == "champion"}

    def log_report(self, name, folder, metrics, tags):
        self.reports[name] = (sorted(file.name for file in folder.iterdir()), metrics, tags)
        self._written()

    def state(self):
        return {"runs": self.runs, "versions": self.versions, "aliases": self.aliases}
