use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

fn get(action: Value) -> Result<Get, String> {
    let container: Container = serde_json::from_value(json!({
        "name": "c", "ports": [{"name": "web", "containerPort": 8080}],
    }))
    .unwrap();
    let action: HTTPGetAction = serde_json::from_value(action).unwrap();
    Get::new(&action, &container, "10.0.0.5", "kube-probe/1.36")
}

/// Answers each connection with the next text; what was asked is handed back.
async fn server(answers: Vec<String>) -> (u16, tokio::task::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        let mut asked = Vec::new();
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut text = Vec::new();
            while !text.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { break };
                text.push(byte);
            }
            asked.push(String::from_utf8_lossy(&text).into_owned());
            stream.write_all(answer.as_bytes()).await.unwrap();
            // Only then closed, so that nothing is cut off.
            let _ = stream.shutdown().await;
        }
        asked
    });
    (port, task)
}

fn answer(code: u16, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {code} X\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
}

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_port_is_a_number_a_name_or_a_number_in_quotes() {
    for (port, wanted) in [
        (json!(9), Ok(9)),
        (json!("web"), Ok(8080)),
        (json!("81"), Ok(81)),
        (json!("nobody"), Err("port nobody not found".to_owned())),
        (json!(0), Err("invalid port number: 0".to_owned())),
        (json!(65536), Err("invalid port number: 65536".to_owned())),
    ] {
        assert_eq!(get(json!({"port": port})).map(|g| g.target.port), wanted);
    }
}

#[test]
fn host_and_path_are_taken_as_a_kubelet_takes_them() {
    let url = |action: Value| get(action).unwrap().target.url();
    assert_eq!(url(json!({"port": 1})), "http://10.0.0.5:1/");
    assert_eq!(
        url(json!({"port": 1, "host": "::1", "scheme": "HTTPS", "path": "a b?x=1&y=%20#z"})),
        "https://[::1]:1/a%20b?x=1&y=%20"
    );
    assert_eq!(
        url(json!({"port": 1, "path": "/50%?"})),
        "http://10.0.0.5:1/50%25%3F"
    );
}

#[test]
fn redirects_are_resolved_against_where_they_came_from() {
    let here = get(json!({"port": 1, "path": "/a/b?q"})).unwrap().target;
    for (location, wanted) in [
        ("/c?d", "http://10.0.0.5:1/c?d"),
        ("c", "http://10.0.0.5:1/a/c"),
        ("../c/./", "http://10.0.0.5:1/c/"),
        ("?z", "http://10.0.0.5:1/a/b?z"),
        ("//other/x", "http://other:80/x"),
        ("https://[::2]:8443", "https://[::2]:8443/"),
    ] {
        assert_eq!(here.resolve(location).unwrap().url(), wanted, "{location}");
    }
    assert_eq!(here.resolve("gopher://x"), None);
}

#[tokio::test]
async fn a_request_carries_the_headers_that_were_asked_for_and_who_asks() {
    let (port, asked) = server(vec![answer(200, "", "fine"), answer(200, "", "")]).await;
    let headers = json!([{"name": "Host", "value": "shop"}, {"name": "X-A", "value": "1"}, {"name": "X-A", "value": "2"}]);
    let got = get(json!({"host": "127.0.0.1", "port": port, "path": "/p", "httpHeaders": headers}))
        .unwrap()
        .fetch(SOON)
        .await
        .unwrap();
    assert_eq!((got.code, got.body.as_slice()), (200, &b"fine"[..]));
    let silent = json!([{"name": "Accept", "value": ""}, {"name": "User-Agent", "value": "me"}]);
    get(json!({"host": "127.0.0.1", "port": port, "httpHeaders": silent}))
        .unwrap()
        .fetch(SOON)
        .await
        .unwrap();
    let asked = asked.await.unwrap();
    assert_eq!(
        asked[0],
        "GET /p HTTP/1.1\r\nHost: shop\r\nX-A: 1\r\nX-A: 2\r\nUser-Agent: kube-probe/1.36\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n"
    );
    assert!(
        asked[1].contains("User-Agent: me\r\n") && !asked[1].contains("Accept"),
        "{}",
        asked[1]
    );
    assert!(
        asked[1].contains(&format!("Host: 127.0.0.1:{port}\r\n")),
        "{}",
        asked[1]
    );
}

#[tokio::test]
async fn a_redirect_is_followed_on_the_same_host_and_handed_back_when_it_leaves_it() {
    let (port, asked) = server(vec![
        answer(302, "location: /next\r\n", ""),
        answer(307, "location: http://elsewhere/\r\n", "bye"),
    ])
    .await;
    let got = get(json!({"host": "127.0.0.1", "port": port}))
        .unwrap()
        .fetch(SOON)
        .await
        .unwrap();
    assert_eq!((got.code, got.body.as_slice()), (307, &b"bye"[..]));
    assert!(asked.await.unwrap()[1].starts_with("GET /next "));
}

#[tokio::test]
async fn a_circle_of_redirects_ends_in_an_error() {
    let (port, _asked) = server(vec![answer(301, "location: /\r\n", ""); 11]).await;
    let error = get(json!({"host": "127.0.0.1", "port": port}))
        .unwrap()
        .fetch(SOON)
        .await
        .unwrap_err();
    assert!(
        error.to_string().ends_with("stopped after 10 redirects"),
        "{error}"
    );
}

#[tokio::test]
async fn a_body_is_read_up_to_ten_kibibytes() {
    let (port, _asked) = server(vec![answer(200, "", &"x".repeat(100_000))]).await;
    let got = get(json!({"host": "127.0.0.1", "port": port}))
        .unwrap()
        .fetch(SOON)
        .await
        .unwrap();
    assert_eq!(got.body.len(), MAX_BODY);
}

#[tokio::test]
async fn nobody_listening_reads_as_a_kubelet_says_it() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let error = get(json!({"host": "127.0.0.1", "port": port}))
        .unwrap()
        .fetch(SOON)
        .await
        .unwrap_err();
    let wanted =
        format!("Get \"http://127.0.0.1:{port}/\": dial tcp 127.0.0.1:{port}: connect: connection refused");
    assert_eq!(error.to_string(), wanted);
}

#[tokio::test]
async fn a_server_that_never_answers_runs_into_the_limit() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let error = get(json!({"host": "127.0.0.1", "port": port}))
        .unwrap()
        .fetch(Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("Client.Timeout exceeded"), "{error}");
}

#[tokio::test]
async fn https_takes_any_certificate() {
    let key = rcgen::generate_simple_self_signed(vec!["nobody".to_owned()]).unwrap();
    let der = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], der)
            .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let mut stream = acceptor.accept(stream).await.unwrap();
        let mut text = [0; 1024];
        let _ = stream.read(&mut text).await.unwrap();
        stream.write_all(answer(204, "", "").as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let get = get(json!({"host": "127.0.0.1", "port": port, "scheme": "HTTPS"})).unwrap();
    assert_eq!(get.fetch(SOON).await.unwrap().code, 204);
}

#[tokio::test]
async fn a_plain_server_behind_https_is_recognised() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut text = [0; 1024];
        let _ = stream.read(&mut text).await.unwrap();
        stream
            .write_all(answer(400, "", "what?").as_bytes())
            .await
            .unwrap();
        let _ = stream.read(&mut text).await;
    });
    let get = get(json!({"host": "127.0.0.1", "port": port, "scheme": "HTTPS",
        "httpHeaders": [{"name": "Authorization", "value": "secret"}]}))
    .unwrap();
    let error = get.fetch(SOON).await.unwrap_err();
    assert!(error.plain_server, "{error}");
    let plain = get.in_plain();
    assert_eq!(plain.target.scheme, Scheme::Http);
    assert!(!plain.headers.contains_key(http::header::AUTHORIZATION));
}
