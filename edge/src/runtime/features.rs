//! What a runtime can do beyond what every runtime must.

/// What a runtime says that it can do. An old runtime says nothing, and then can do nothing of this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `supplementalGroupsPolicy: Strict` is honoured.
    pub supplemental_groups_policy: bool,
    /// The low-level runtimes, the default one under the empty name.
    pub handlers: Vec<Handler>,
    /// Images can be mounted as volumes, as far as can be told.
    pub image_mounts: bool,
}

/// A low-level runtime that a RuntimeClass may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handler {
    /// Its name; empty for the default.
    pub name: String,
    /// Mounts can be read only all the way down.
    pub recursive_readonly: bool,
    /// Pods can have user namespaces.
    pub user_namespaces: bool,
}

impl Features {
    /// The handler of that name; one that can do nothing more when the runtime has not named it.
    pub fn handler(&self, name: &str) -> Handler {
        self.handlers
            .iter()
            .find(|handler| handler.name == name)
            .cloned()
            .unwrap_or_default()
    }
}
