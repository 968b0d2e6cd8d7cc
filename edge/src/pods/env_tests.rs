use super::*;
use crate::pods::fixtures::pod;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Secret};
use serde_json::json;

/// Objects from JSON.
#[derive(Default)]
struct Fixed {
    services: Vec<Service>,
}

impl Objects for Fixed {
    fn config_map(&self, _: &str, name: &str) -> Option<ConfigMap> {
        (name == "m").then(|| serde_json::from_value(json!({"data": {"A": "1", "B": "2"}})).unwrap())
    }
    fn secret(&self, _: &str, name: &str) -> Option<Secret> {
        (name == "s").then(|| serde_json::from_value(json!({"data": {"P": "cHc="}})).unwrap())
    }
    fn services(&self) -> Vec<Service> {
        self.services.clone()
    }
    fn node(&self) -> Option<Node> {
        serde_json::from_value(json!({"status": {"allocatable": {"cpu": "4", "memory": "1Gi"}}})).ok()
    }
    fn token(&self, _: &str) -> Option<String> {
        None
    }
}

fn resolve(container: serde_json::Value, objects: &Fixed) -> Result<Vec<(String, String)>, ConfigError> {
    resolve_in(json!({}), container, objects)
}

/// The same in a pod with resources of its own.
fn resolve_in(
    resources: serde_json::Value,
    container: serde_json::Value,
    objects: &Fixed,
) -> Result<Vec<(String, String)>, ConfigError> {
    let mut container = container;
    container["name"] = json!("c");
    let pod = pod(json!({"nodeName": "n", "resources": resources, "containers": [container]}));
    let facts = Facts {
        pod: &pod,
        host_ip: "10.0.0.1".parse().ok(),
        pod_ips: &[],
        objects,
    };
    environment(&facts, &pod.spec.as_ref().unwrap().containers[0])
}

#[test]
fn env_overrides_env_from_and_expands_what_came_before() {
    let vars = resolve(
        json!({"envFrom": [{"configMapRef": {"name": "m"}}, {"prefix": "X_", "secretRef": {"name": "s"}}],
            "env": [{"name": "A", "value": "$(X_P)-$(NOPE)-$$(B)"}, {"name": "C", "value": "$(A)"}]}),
        &Fixed::default(),
    )
    .unwrap();
    let map: HashMap<_, _> = vars.into_iter().collect();
    assert_eq!(map["A"], "pw-$(NOPE)-$(B)");
    assert_eq!(map["C"], map["A"]);
    assert_eq!(map["B"], "2");
}

#[test]
fn what_is_missing_is_named_unless_it_is_optional() {
    let objects = Fixed::default();
    let env = |v: serde_json::Value| json!({"env": [{"name": "A", "valueFrom": v}]});
    let missing = resolve(
        env(json!({"configMapKeyRef": {"name": "x", "key": "k"}})),
        &objects,
    );
    assert_eq!(missing, Err(ConfigError("configmap \"x\" not found".into())));
    let key = resolve(env(json!({"secretKeyRef": {"name": "s", "key": "k"}})), &objects);
    assert_eq!(
        key,
        Err(ConfigError("couldn't find key k in Secret default/s".into()))
    );
    let optional = resolve(
        env(json!({"secretKeyRef": {"name": "x", "key": "k", "optional": true}})),
        &objects,
    );
    assert_eq!(optional, Ok(vec![]));
}

#[test]
fn fields_and_resources_resolve() {
    let field = |path: &str| json!({"name": path, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let resource = |name: &str, r: &str, d: &str| json!({"name": name, "valueFrom": {"resourceFieldRef": {"resource": r, "divisor": d}}});
    let vars = resolve(
        json!({"resources": {"limits": {"cpu": "1500m"}, "requests": {"memory": "10Mi"}},
            "env": [field("metadata.name"), field("metadata.labels['app']"), field("spec.nodeName"), field("status.podIP"),
                resource("cpu", "limits.cpu", "1"), resource("cpum", "limits.cpu", "1m"),
                resource("mem", "requests.memory", "1Mi"), resource("node", "limits.memory", "1")]}),
        &Fixed::default(),
    )
    .unwrap();
    let values: Vec<_> = vars.iter().map(|(_, v)| v.as_str()).collect();
    assert_eq!(
        values,
        ["p", "x", "n", "10.0.0.1", "2", "1500", "10", "1073741824"]
    );
}

#[test]
fn a_limit_that_the_container_lacks_is_the_pod_s_and_then_the_node_s() {
    let resource = |r: &str| json!({"name": r, "valueFrom": {"resourceFieldRef": {"resource": r}}});
    let vars = resolve_in(
        json!({"limits": {"cpu": "3", "memory": "64Mi"}}),
        json!({"resources": {"limits": {"memory": "0"}}, "env": [resource("limits.cpu"), resource("limits.memory")]}),
        &Fixed::default(),
    );
    let values: Vec<_> = vars.unwrap().into_iter().map(|(_, v)| v).collect();
    assert_eq!(values, ["3", "67108864"]);
}

#[test]
fn services_give_the_variables_of_a_kubelet() {
    let service = |ns: &str, name: &str| {
        serde_json::from_value::<Service>(json!({"metadata": {"name": name, "namespace": ns},
            "spec": {"clusterIP": "10.9.0.1", "ports": [{"port": 80, "name": "web-x"}]}}))
        .unwrap()
    };
    let objects = Fixed {
        services: vec![
            service("default", "my-db"),
            service("other", "no"),
            service("default", "kubernetes"),
        ],
    };
    let map: HashMap<_, _> = resolve(json!({}), &objects).unwrap().into_iter().collect();
    assert_eq!(map["MY_DB_SERVICE_HOST"], "10.9.0.1");
    assert_eq!(map["MY_DB_SERVICE_PORT_WEB_X"], "80");
    assert_eq!(map["MY_DB_PORT_80_TCP"], "tcp://10.9.0.1:80");
    assert!(map.contains_key("KUBERNETES_SERVICE_HOST") && !map.contains_key("NO_SERVICE_HOST"));
}
