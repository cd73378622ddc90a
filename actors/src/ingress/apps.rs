//! Which application answers a path, and which of its models a name: what is looked up for every HTTP request.
//!
//! The table is replaced as a whole; requests under way keep what they found.

use std::sync::{Arc, PoisonError, RwLock};

use actix_web::dev::ServiceRequest;
use actix_web::web::Data;
use tokio_util::task::AbortOnDropHandle;

use super::forward::ActorPool;
use super::handle::Ingress;
use super::model::ServedModel;
use super::proxy::{Ongoing, Proxy};
use crate::serve::calls::counts;

/// All applications. Cheap to clone.
#[derive(Clone, Default)]
pub struct Apps(Arc<RwLock<Vec<Arc<AppRoute>>>>);

/// An application and the start of its paths.
pub struct AppRoute {
    /// Its name.
    pub name: String,
    /// Without a slash at its end: empty for the root.
    prefix: String,
    models: Vec<ModelRoute>,
    actors: Option<ActorPool>,
    /// Of its other deployments: who answers asks them.
    behind: Vec<ActorPool>,
    proxy: Proxy,
}

/// A model that answers in an application. Cheap to clone.
#[derive(Clone)]
pub struct ModelRoute {
    pub(super) ingress: Data<Ingress>,
    pub(super) model: Data<Arc<ServedModel>>,
    _clock: Arc<AbortOnDropHandle<()>>,
}

impl ModelRoute {
    /// Must be called inside a tokio runtime.
    pub fn new(ingress: Ingress, model: Arc<ServedModel>) -> Self {
        let clock = AbortOnDropHandle::new(tokio::spawn(ingress.clone().watch_time()));
        Self { ingress: Data::new(ingress), model: Data::new(model), _clock: Arc::new(clock) }
    }

    /// The same requests under other names.
    #[must_use]
    pub fn with_model(&self, model: Arc<ServedModel>) -> Self {
        Self { model: Data::new(model), ..self.clone() }
    }
}

impl AppRoute {
    /// `prefix` is as Ray writes it: `/`, `/chat`. `models` are in order of preference, at least one.
    pub fn new(name: &str, prefix: &str, models: Vec<ModelRoute>) -> Self {
        Self {
            name: name.to_owned(),
            prefix: prefix.trim_end_matches('/').to_owned(),
            models,
            actors: None,
            behind: Vec::new(),
            proxy: Proxy::new(name),
        }
    }

    /// An application of users' actors: `actors` answer, and ask those `behind` them.
    pub(crate) fn of_actors(name: &str, prefix: &str, actors: ActorPool, behind: Vec<ActorPool>) -> Self {
        Self { actors: Some(actors), behind, ..Self::new(name, prefix, Vec::new()) }
    }

    /// Its replicas, where it is an actor of a user.
    pub(super) fn actors(&self) -> Option<&ActorPool> {
        self.actors.as_ref()
    }

    /// What of a path is told of: its pattern, of which there are few; below a user's actor all are one.
    pub(super) fn pattern(&self, request: &ServiceRequest) -> String {
        match &self.actors {
            Some(_) => self.prefix().to_owned(),
            None => request.match_pattern().unwrap_or_else(|| "other".to_owned()),
        }
    }

    /// A request came.
    pub(super) fn begin(&self, request: &ServiceRequest) -> Ongoing {
        let deployment = self.actors.as_ref().map(|actors| actors.counts().0);
        self.proxy.begin(request, self.pattern(request), deployment)
    }

    /// As Ray writes it.
    pub fn prefix(&self) -> &str {
        if self.prefix.is_empty() { "/" } else { &self.prefix }
    }

    /// All models; of two that stand for one while it is updated, both.
    pub fn models(&self) -> impl Iterator<Item = &Arc<ServedModel>> {
        self.models.iter().map(|route| route.model.get_ref())
    }

    /// Whether a request must say which model it means.
    pub(super) fn has_several(&self) -> bool {
        self.models.len() > 1
    }

    /// The model of that name: of two that have it, the one with more ranks. Without such a model the first, which says
    /// so to the client.
    pub(super) fn choose(&self, name: Option<&str>) -> Option<&ModelRoute> {
        if !self.has_several() {
            return self.models.first();
        }
        let called = |route: &&ModelRoute| name.is_some_and(|name| route.model.is_called(name));
        // The first of equals is the newer one.
        let best = self.models.iter().rev().filter(called).max_by_key(|route| route.ingress.open_ranks());
        best.or(self.models.first())
    }

    /// The rest of a path below its prefix.
    fn below<'a>(&self, path: &'a str) -> Option<&'a str> {
        path.strip_prefix(&self.prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// What it still waits for.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn ready(&self) -> Result<(), Vec<String>> {
        let mut names: Vec<&str> = self.models.iter().map(|route| route.model.name()).collect();
        names.dedup();
        self.actors.iter().chain(&self.behind).try_for_each(ActorPool::ready)?;
        for name in names {
            if let Some(route) = self.choose(Some(name)) {
                route.ingress.ready()?;
            }
        }
        Ok(())
    }
}

impl Apps {
    /// One model at the root, and nothing else. Must be called inside a tokio runtime.
    pub fn single(ingress: Ingress, model: ServedModel) -> Self {
        let apps = Self::default();
        let route = ModelRoute::new(ingress, Arc::new(model));
        apps.set(vec![AppRoute::new("default", "/", vec![route])]);
        apps
    }

    /// Serves exactly these from now on. Those without a model or an actor are left out. What is counted goes on.
    pub fn set(&self, mut routes: Vec<AppRoute>) {
        for before in self.all() {
            let same = routes.iter_mut().filter(|route| route.name == before.name);
            same.for_each(|route| route.proxy = before.proxy.clone());
        }
        let mut routes: Vec<Arc<AppRoute>> = routes
            .into_iter()
            .filter(|it| !it.models.is_empty() || it.actors.is_some())
            .map(Arc::new)
            .collect();
        routes.sort_by_key(|route| std::cmp::Reverse(route.prefix.len()));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = routes;
    }

    /// All applications, the longest prefix first.
    pub fn all(&self) -> Vec<Arc<AppRoute>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The application with the longest prefix of `path`, and what follows the prefix.
    pub(super) fn find<'a>(&self, path: &'a str) -> Option<(Arc<AppRoute>, &'a str)> {
        let routes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        routes.iter().find_map(|route| Some((Arc::clone(route), route.below(path)?)))
    }

    /// What is still waited for before every application takes requests.
    ///
    /// # Errors
    /// What is missing.
    pub fn ready(&self) -> Result<(), String> {
        let routes = self.all();
        if routes.is_empty() {
            return Err("no application is deployed".to_owned());
        }
        routes.iter().try_for_each(|route| route.ready()).map_err(|missing| missing.join("; "))
    }

    /// From now on new requests are refused; those in flight go on.
    pub(super) fn stop_taking_requests(&self) {
        for route in self.all() {
            route.models.iter().for_each(|model| model.ingress.stop_taking_requests());
        }
    }

    /// The metrics of all applications and `own`, those of the process, each family once.
    pub(super) fn metrics(&self, own: String) -> String {
        let apps = self.all();
        let models = apps.iter().flat_map(|app| &app.models).map(|model| model.ingress.metrics().render());
        let counts = apps.iter().filter_map(|app| {
            let (deployment, counts) = app.actors.as_ref()?.counts();
            Some(((app.name.clone(), deployment), counts))
        });
        let calls = counts::render(&counts.collect::<Vec<_>>());
        merge(models.chain(apps.iter().map(|app| app.proxy.render())).chain([calls, own]))
    }
}

/// Puts texts of the same families together: the lines of a family must follow each other.
fn merge(texts: impl Iterator<Item = String>) -> String {
    let mut families: Vec<(String, String)> = Vec::new();
    for text in texts {
        let mut at = None;
        for line in text.lines().filter(|line| *line != "# EOF") {
            if let Some(family) = line.strip_prefix("# HELP ") {
                let name = family.split(' ').next().unwrap_or_default();
                let known = families.iter().position(|(known, _)| known == name);
                at = Some(known.unwrap_or_else(|| {
                    families.push((name.to_owned(), String::new()));
                    families.len() - 1
                }));
                if known.is_some() {
                    continue;
                }
            }
            let Some(at) = at else { continue };
            let lines = &mut families[at].1;
            // What is said of the family is said once.
            if !line.starts_with('#') || !lines.contains(&format!("{line}\n")) {
                lines.push_str(line);
                lines.push('\n');
            }
        }
    }
    families.into_iter().map(|(_, lines)| lines).chain(std::iter::once("# EOF\n".to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_answers_and_only_whole_parts_count() {
        let apps = Apps::default();
        let route = |prefix| Arc::new(AppRoute::new(prefix, prefix, Vec::new()));
        let mut routes = vec![route("/"), route("/chat"), route("/chat/small")];
        routes.sort_by_key(|route| std::cmp::Reverse(route.prefix.len()));
        *apps.0.write().unwrap() = routes;
        let find = |path| apps.find(path).map(|(route, rest)| (route.name.clone(), rest.to_owned()));
        let found = |name: &str, rest: &str| Some((name.to_owned(), rest.to_owned()));
        assert_eq!(find("/v1/models"), found("/", "/v1/models"));
        assert_eq!(find("/chat/v1/models"), found("/chat", "/v1/models"));
        assert_eq!(find("/chat"), found("/chat", ""));
        assert_eq!(find("/chatter"), found("/", "/chatter"));
        assert_eq!(find("/chat/small/health"), found("/chat/small", "/health"));
    }

    #[test]
    fn merged_metrics_say_each_family_once() {
        let text = |model: &str| {
            format!(
                "# HELP a Of a.\n# TYPE a counter\na_total{{m=\"{model}\"}} 1\n# HELP b Of b.\nb 2\n# EOF\n"
            )
        };
        let merged = merge([text("x"), text("y")].into_iter());
        assert_eq!(
            merged,
            "# HELP a Of a.\n# TYPE a counter\na_total{m=\"x\"} 1\na_total{m=\"y\"} 1\n# HELP b Of b.\nb 2\nb 2\n# EOF\n"
        );
    }
}
