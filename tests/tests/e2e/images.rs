//! Images from a registry that wants to know who asks.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use skerry_tests::doorkeeper::{Door, Doorkeeper};
use skerry_tests::pods::{event, output, phase, ready, waiting};
use skerry_tests::registry::{Registry, ctr, import_image};
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{IMAGE, Runtime, Site};
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    let containerd = |name, run| Scenario::on(Runtime::Containerd, name, run);
    [
        containerd(
            "an image of a private registry is for pods that have its Secret",
            private_image,
        ),
        containerd("a Secret of the older form opens a registry, too", legacy_secret),
        containerd("an image is pulled by its digest, and only once", digest),
        containerd("a name that cannot be an image's is refused", invalid_name),
        containerd(
            "no more images are pulled at a time than the node may",
            bounded_pulls,
        ),
        containerd(
            "a registry that has too much to do is named, and asked again later",
            busy_registry,
        ),
        containerd(
            "whose a pulled image is outlives a restart of the daemon",
            access_after_restart,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn registry(t: &Test<'_>) -> Registry {
    Registry::start(&t.cluster.dir().join(t.name("registry")))
}

fn user(image: &str, policy: &str, secrets: &[&str]) -> Value {
    let secrets: Vec<Value> = secrets.iter().map(|name| json!({"name": name})).collect();
    json!({"restartPolicy": "Never", "imagePullSecrets": secrets, "containers": [
        {"image": image, "imagePullPolicy": policy, "command": ["echo", "fetched"]}]})
}

fn private_image(t: &Test<'_>) {
    let (site, registry) = (t.site(), registry(t));
    registry.push(site, IMAGE, "private/tool:1");
    let image = format!("{}/private/tool:1", registry.host());
    let apply = |name: &str, policy: &str, secrets: &[&str]| {
        t.kubectl.apply(&site.pod(name, user(&image, policy, secrets)));
    };

    apply("stranger", "IfNotPresent", &["nobody-s"]);
    let status = waiting(&t.kubectl, "stranger", &["ErrImagePull", "ImagePullBackOff"]);
    let status = status["state"]["waiting"]["message"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(status.contains(&image), "{status}");
    let failed = event(&t.kubectl, "stranger", "FailedToRetrieveImagePullSecret");
    assert!(failed.contains("nobody-s"), "{failed}");
    waiting(&t.kubectl, "stranger", &["ImagePullBackOff"]);
    assert_eq!(
        event(&t.kubectl, "stranger", "BackOff"),
        format!("Back-off pulling image \"{image}\"")
    );

    t.kubectl.apply(&registry.secret("pull"));
    apply("owner", "IfNotPresent", &["pull"]);
    assert_eq!(output(&t.kubectl, "owner"), "fetched\n");
    assert_eq!(
        event(&t.kubectl, "owner", "Pulling"),
        format!("Pulling image \"{image}\"")
    );
    let pulled = event(&t.kubectl, "owner", "Pulled");
    assert!(
        pulled.starts_with(&format!("Successfully pulled image \"{image}\" in "))
            && pulled.contains(" including waiting). Image size: ")
            && pulled.ends_with(" bytes."),
        "{pulled}"
    );

    // It is on the node's disk now, but not for everybody.
    apply("thief", "Never", &[]);
    waiting(&t.kubectl, "thief", &["ErrImageNeverPull"]);
    assert_eq!(
        event(&t.kubectl, "thief", "ErrImageNeverPull"),
        format!("Container image \"{image}\" is not present with pull policy of Never")
    );
    apply("friend", "Never", &["pull"]);
    assert_eq!(output(&t.kubectl, "friend"), "fetched\n");
    assert_eq!(
        event(&t.kubectl, "friend", "Pulled"),
        format!("Container image \"{image}\" already present on machine and can be accessed by the pod")
    );
    // The same bytes were there before under a name of their own: that name stays everybody's.
    t.kubectl.apply(&site.pod("bystander", user(IMAGE, "Never", &[])));
    assert_eq!(output(&t.kubectl, "bystander"), "fetched\n");
}

fn legacy_secret(t: &Test<'_>) {
    let (site, registry) = (t.site(), registry(t));
    registry.push(site, IMAGE, "private/old:1");
    let image = format!("{}/private/old:1", registry.host());
    t.kubectl.apply(&registry.legacy_secret("old"));
    t.kubectl
        .apply(&site.pod("pod", user(&image, "Always", &["old"])));
    assert_eq!(output(&t.kubectl, "pod"), "fetched\n");
    let pulled = event(&t.kubectl, "pod", "Pulled");
    assert!(pulled.starts_with("Successfully pulled image "), "{pulled}");
}

fn digest(t: &Test<'_>) {
    let (site, registry) = (t.site(), registry(t));
    let digest = registry.push(site, IMAGE, "fleet/tool:2");
    let image = format!("{}/fleet/tool@{digest}", registry.host());
    t.kubectl.apply(&registry.secret("pull"));
    let spec = json!({"imagePullSecrets": [{"name": "pull"}], "containers": [
        {"image": image, "command": ["sleep", "1000"]}, {"image": image, "command": ["sleep", "1000"]}]});
    t.kubectl.apply(&site.pod("pod", spec));
    let pod = ready(&t.kubectl, "pod");
    for status in pod["status"]["containerStatuses"].as_array().unwrap() {
        assert_eq!(status["image"], image.as_str());
        assert!(
            status["imageID"].as_str().unwrap().contains("sha256:"),
            "{status}"
        );
    }
    let started = t
        .kubectl
        .list(
            "events",
            &["--field-selector", "involvedObject.name=pod,reason=Pulling"],
        )
        .unwrap();
    assert_eq!(started.len(), 1, "{started:?}");
}

fn invalid_name(t: &Test<'_>) {
    t.kubectl
        .apply(&t.site().pod("pod", user("Not/An:Image", "IfNotPresent", &[])));
    let status = waiting(&t.kubectl, "pod", &["InvalidImageName"]);
    let message = status["state"]["waiting"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("Failed to apply default image tag \"Not/An:Image\": couldn't parse image name"),
        "{message}"
    );
    phase(&t.kubectl, "pod", "Pending");
}

fn bounded_pulls(t: &Test<'_>) {
    const MOST: usize = 2;
    let (mut site, registry) = (t.own_site(), registry(t));
    let door = Doorkeeper::before(registry.address());
    let names: BTreeSet<String> = (0..5).map(|i| format!("many/tool-{i}")).collect();
    for name in &names {
        registry.push(&site, IMAGE, &format!("{name}:1"));
    }
    site.stop_edge();
    site.set_flags(&["--max-parallel-image-pulls=2"]);
    site.start_edge();
    site.wait_ready();

    door.set(Door::Closed);
    t.kubectl.apply(&registry.secret_at(&door.host(), "pull"));
    let pod = |name: &str| name.replace('/', "-");
    for name in &names {
        let image = format!("{}/{name}:1", door.host());
        t.kubectl
            .apply(&site.pod(&pod(name), user(&image, "Always", &["pull"])));
    }
    // Each has been begun as far as the pods can tell.
    for name in &names {
        event(&t.kubectl, &pod(name), "Pulling");
    }
    let mut left = names.clone();
    while !left.is_empty() {
        let waiting = eventually(SOON, "the next pulls are at the door", || {
            let waiting: BTreeSet<_> = door.waiting().intersection(&left).cloned().collect();
            same(waiting.len(), MOST.min(left.len())).map(|()| waiting)
        });
        let first = waiting.first().unwrap();
        door.let_in(first);
        assert_eq!(output(&t.kubectl, &pod(first)), "fetched\n");
        left.remove(first);
    }
}

fn busy_registry(t: &Test<'_>) {
    let (site, registry) = (t.site(), registry(t));
    let door = Doorkeeper::before(registry.address());
    registry.push(site, IMAGE, "crowded/tool:1");
    let image = format!("{}/crowded/tool:1", door.host());
    t.kubectl.apply(&registry.secret_at(&door.host(), "pull"));
    door.set(Door::Busy);
    t.kubectl
        .apply(&site.pod("pod", user(&image, "Always", &["pull"])));
    let status = waiting(&t.kubectl, "pod", &["ErrImagePull", "ImagePullBackOff"]);
    let message = status["state"]["waiting"]["message"].as_str().unwrap();
    assert!(message.contains(&image) && message.contains("429"), "{message}");
    // Another event of that reason says no more than ErrImagePull.
    eventually(SOON, "an event says what the registry answered", || {
        let events = t.kubectl.list("events", &["--field-selector", "reason=Failed"])?;
        let said = |event: &Value| {
            event["message"]
                .as_str()
                .is_some_and(|m| m.contains("429 Too Many Requests"))
        };
        same(events.iter().any(said), true)
    });
    waiting(&t.kubectl, "pod", &["ImagePullBackOff"]);
    assert_ne!(door.turned_away(), 0);
    door.set(Door::Open);
    assert_eq!(output(&t.kubectl, "pod"), "fetched\n");
}

fn access_after_restart(t: &Test<'_>) {
    const OWN: &str = "docker.io/library/own:1";
    let (mut site, registry) = (t.own_site(), registry(t));
    import_image(&site, OWN);
    registry.push(&site, OWN, "private/own:1");
    ctr(&site, &["rm", "--sync", OWN]);
    let image = format!("{}/private/own:1", registry.host());
    let apply = |site: &Site, name: &str, policy: &str, secrets: &[&str]| {
        t.kubectl.apply(&site.pod(name, user(&image, policy, secrets)));
    };
    t.kubectl.apply(&registry.secret("pull"));
    apply(&site, "owner", "IfNotPresent", &["pull"]);
    assert_eq!(output(&t.kubectl, "owner"), "fetched\n");

    assert_eq!(site.stop_edge(), 0);
    site.start_edge();
    site.wait_ready();
    apply(&site, "thief", "Never", &[]);
    waiting(&t.kubectl, "thief", &["ErrImageNeverPull"]);
    apply(&site, "friend", "Never", &["pull"]);
    assert_eq!(output(&t.kubectl, "friend"), "fetched\n");
}
