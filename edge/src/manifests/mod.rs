//! Static pods: pods that come from files of the site and need no cloud, not even once.
//!
//! **In:** a directory of manifests, one Pod a file (YAML or JSON), watched and read again every now and then. **Out:**
//! the set of static pods for [`crate::pods`], and their mirrors in the API ([`mirror`]).
//!
//! A static pod's UID is a hash of what the file says, so that a changed file is another pod under the same name: the
//! old one is stopped, then the new one starts. Names starting with `.` are left alone, which covers editors' files and
//! the directories behind mounted ConfigMaps.
//!
//! What must always hold:
//! * A file that cannot be used never stops the others, and is named: in the log, in an event of the Node, in a metric.
//! * A file that turns bad does not stop the pod that it gave before; only removing it does.
//! * As long as the directory could not be read, no static pod is stopped.
//!
//! Source: kubelet, file source.

pub(crate) mod mirror;
pub(crate) mod read;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use skerry_proto::SiteName;
use skerry_proto::object::Uid;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::pods::{Level, NodeEvents, Pods, StaticPods};
use read::{ManifestError, parse};

/// Where manifests are, and how often they are read again whatever the watch says.
#[derive(Clone, Debug)]
pub struct ManifestsConfig {
    /// The directory.
    pub directory: PathBuf,
    /// The interval.
    pub every: Duration,
}

/// What a manifests room works with.
pub struct Deps {
    /// The Node whose name the pods get.
    pub node: SiteName,
    /// Where the pods run.
    pub pods: Pods,
    /// Where bad files are told.
    pub events: NodeEvents,
    /// Where they are counted.
    pub metrics: Arc<Metrics>,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

/// The directory as last read.
pub struct Manifests {
    config: ManifestsConfig,
    deps: Deps,
    files: BTreeMap<PathBuf, Manifest>,
    /// Files that are wrong, and how, as last told.
    told: BTreeMap<PathBuf, String>,
}

/// One file.
struct Manifest {
    text: String,
    /// What it gives, or gave before it went bad.
    pod: Option<Arc<Pod>>,
    error: Option<ManifestError>,
}

impl Manifests {
    /// Reads the directory once, so that the pods are known before anything is stopped or started.
    pub async fn open(config: ManifestsConfig, deps: Deps) -> Self {
        let mut this = Self {
            config,
            deps,
            files: BTreeMap::new(),
            told: BTreeMap::new(),
        };
        this.scan().await;
        this
    }

    /// Follows the directory until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut watch = watch::Watch::default();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = watch.changed(&self.config.directory, self.config.every) => {}
            }
            self.scan().await;
        }
    }

    async fn scan(&mut self) {
        let directory = self.config.directory.clone();
        let read = tokio::task::spawn_blocking(move || read_all(&directory)).await;
        let (set, mut wrong) = match read.map_err(io::Error::other).and_then(|read| read) {
            Ok(texts) => {
                let now = self.deps.clock.now();
                update(&mut self.files, texts, &self.deps.node, now);
                (StaticPods::Known(self.pods()), self.wrong())
            }
            Err(error) => {
                let message = format!("the directory cannot be read: {error}");
                let wrong = BTreeMap::from([(self.config.directory.clone(), message)]);
                let set = match self.files.is_empty() {
                    true => StaticPods::Unknown,
                    false => StaticPods::Known(self.pods()),
                };
                (set, wrong)
            }
        };
        if let StaticPods::Known(pods) = &set {
            self.deps.metrics.set_static_pods(pods.len(), wrong.len());
        }
        self.deps.pods.set_static(set);
        std::mem::swap(&mut self.told, &mut wrong);
        for (path, message) in &self.told {
            if wrong.get(path) == Some(message) {
                continue;
            }
            tracing::error!(file = %path.display(), reason = message, "a static pod's file cannot be used; the others go on");
            let text = format!("{}: {message}", path.display());
            let node = &self.deps.node;
            self.deps
                .events
                .emit(node, Level::Warning, "InvalidStaticPod", text)
                .await;
        }
    }

    /// The pods of all files, by UID.
    fn pods(&self) -> BTreeMap<Uid, Arc<Pod>> {
        let pods = self.files.values().filter_map(|file| file.pod.clone());
        pods.filter_map(|pod| Some((Uid::from(pod.metadata.uid.clone()?), pod)))
            .collect()
    }

    fn wrong(&self) -> BTreeMap<PathBuf, String> {
        let errors = self.files.iter().filter_map(|(path, file)| {
            let error = file.error.as_ref()?;
            let kept = if file.pod.is_some() {
                "; the pod that it gave before goes on"
            } else {
                ""
            };
            Some((path.clone(), format!("{error}{kept}")))
        });
        errors.collect()
    }
}

/// The texts of the files of a directory; a directory that does not exist has none.
fn read_all(directory: &Path) -> io::Result<BTreeMap<PathBuf, Result<String, ManifestError>>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        other => other?,
    };
    let mut texts = BTreeMap::new();
    for entry in entries {
        let entry = entry?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let path = entry.path();
        // Follows links, as those of a mounted ConfigMap.
        let is_file = fs::metadata(&path).is_ok_and(|m| m.is_file());
        if hidden || !is_file {
            continue;
        }
        match read_one(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                texts.insert(path, Err(ManifestError::Read(error.to_string())));
            }
            Ok(text) => {
                texts.insert(path, text);
            }
        }
    }
    Ok(texts)
}

fn read_one(path: &Path) -> io::Result<Result<String, ManifestError>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?
        .take(read::MAX_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > read::MAX_BYTES {
        return Ok(Err(ManifestError::TooLarge));
    }
    Ok(String::from_utf8(bytes).map_err(|e| ManifestError::Syntax(e.to_string())))
}

/// Brings `files` to what was read. A file whose text is the same keeps its pod.
fn update(
    files: &mut BTreeMap<PathBuf, Manifest>,
    texts: BTreeMap<PathBuf, Result<String, ManifestError>>,
    node: &SiteName,
    now: Timestamp,
) {
    files.retain(|path, _| texts.contains_key(path));
    for (path, text) in texts {
        let before = files.get(&path);
        let kept = before.and_then(|file| file.pod.clone());
        let file = match text {
            Ok(text) => {
                if before.is_some_and(|file| {
                    file.text == text && !matches!(file.error, Some(ManifestError::Duplicate(_)))
                }) {
                    continue;
                }
                match parse(&text, &path.to_string_lossy(), node, now) {
                    Ok(pod) => Manifest {
                        text,
                        pod: Some(Arc::new(pod)),
                        error: None,
                    },
                    Err(error) => Manifest {
                        text,
                        pod: kept,
                        error: Some(error),
                    },
                }
            }
            Err(error) => Manifest {
                text: String::new(),
                pod: kept,
                error: Some(error),
            },
        };
        files.insert(path, file);
    }
    // Two files under one name: the first by path has it.
    let mut names = BTreeSet::new();
    for file in files.values_mut() {
        let Some(pod) = &file.pod else { continue };
        let name = full_name(pod);
        if !names.insert(name.clone()) {
            file.pod = None;
            file.error = Some(ManifestError::Duplicate(name));
        }
    }
}

/// `namespace/name`.
pub(crate) fn full_name(pod: &Pod) -> String {
    let metadata = &pod.metadata;
    format!(
        "{}/{}",
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.name.as_deref().unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, image: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{containers: [{{name: c, image: {image}}}]}}}}"
        )
    }

    fn look(directory: &Path, files: &mut BTreeMap<PathBuf, Manifest>) -> Vec<(String, bool)> {
        let node = "n".parse().unwrap();
        update(files, read_all(directory).unwrap(), &node, Timestamp::UNIX_EPOCH);
        let image = |pod: &Pod| pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
        files
            .values()
            .map(|f| {
                (
                    f.pod.as_ref().map(|p| image(p)).unwrap_or_default(),
                    f.error.is_some(),
                )
            })
            .collect()
    }

    #[test]
    fn a_file_that_turns_bad_keeps_its_pod_and_one_that_goes_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = BTreeMap::new();
        let a = dir.path().join("a.yaml");
        std::fs::write(&a, pod("a", "one:1")).unwrap();
        std::fs::write(dir.path().join("b.json"), "nonsense: [").unwrap();
        std::fs::write(dir.path().join(".hidden.yaml"), pod("h", "h:1")).unwrap();
        std::fs::create_dir(dir.path().join("directory")).unwrap();
        assert_eq!(
            look(dir.path(), &mut files),
            [("one:1".into(), false), (String::new(), true)]
        );
        std::fs::write(&a, "half a fi: [").unwrap();
        assert_eq!(look(dir.path(), &mut files)[0], ("one:1".into(), true));
        std::fs::write(&a, pod("a", "two:1")).unwrap();
        assert_eq!(look(dir.path(), &mut files)[0], ("two:1".into(), false));
        std::fs::remove_file(&a).unwrap();
        assert_eq!(look(dir.path(), &mut files), [(String::new(), true)]);
    }

    #[test]
    fn of_two_files_for_one_name_the_first_has_it_until_it_goes() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = BTreeMap::new();
        std::fs::write(dir.path().join("1"), pod("a", "one:1")).unwrap();
        std::fs::write(dir.path().join("2"), pod("a", "two:1")).unwrap();
        assert_eq!(
            look(dir.path(), &mut files),
            [("one:1".into(), false), (String::new(), true)]
        );
        std::fs::remove_file(dir.path().join("1")).unwrap();
        assert_eq!(look(dir.path(), &mut files), [("two:1".into(), false)]);
    }

    #[test]
    fn a_directory_that_does_not_exist_has_no_pods() {
        assert!(read_all(Path::new("/nonexistent/manifests")).unwrap().is_empty());
    }
}
