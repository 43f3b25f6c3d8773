{{/* TLS between the parts of a release, where auth.internalTls names its Secret; see docs/tls.md. */}}

{{/* The name that the certificate bears, and that whoever dials verifies. */}}
{{- define "pdcoord.internalTlsName" -}}
{{- default (printf "%s.%s.svc" (include "pdcoord.controlName" .) .Release.Namespace) .Values.auth.internalTls.serverName -}}
{{- end -}}

{{/* The Secret, mounted whole so that a change arrives; an entry of a pod's volumes. */}}
{{- define "pdcoord.internalTlsVolume" -}}
{{- with .Values.auth.internalTls.secretName -}}
- name: pdcoord-internal-tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}, {key: ca.crt, path: ca.crt}]
{{- end }}
{{- end -}}

{{- define "pdcoord.internalTlsMount" -}}
{{- if .Values.auth.internalTls.secretName -}}
- {name: pdcoord-internal-tls, mountPath: /etc/pdcoord/internal-tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* Certificates of the control stream, where the values name a Secret for it alone; an entry of a pod's volumes. */}}
{{- define "pdcoord.controlTlsVolume" -}}
{{- with .Values.auth.controlTls.secretName -}}
- name: pdcoord-control-tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}, {key: ca.crt, path: ca.crt}]
{{- end }}
{{- end -}}

{{/* Folder of the control stream's certificates: its own, else those of all parts; empty: it is not encrypted. */}}
{{- define "pdcoord.controlTlsFolder" -}}
{{- if .Values.auth.controlTls.secretName -}}/etc/pdcoord/control-tls
{{- else if .Values.auth.internalTls.secretName -}}/etc/pdcoord/internal-tls
{{- end -}}
{{- end -}}

{{/* How the coordinator's pages are asked for: its front door, or the picker's own port for them. */}}
{{- define "pdcoord.pagesScheme" -}}
{{- if eq .Values.gateway.mode "embedded" -}}{{- include "pdcoord.frontScheme" . -}}
{{- else -}}{{- ternary "https" "http" (ne .Values.auth.internalTls.secretName "") -}}
{{- end -}}
{{- end -}}

{{/* How a server's ports are spoken to. */}}
{{- define "pdcoord.serverScheme" -}}
{{- ternary "https" "http" (ne .Values.auth.internalTls.secretName "") -}}
{{- end -}}

{{/*
{"root", "isClient"}: what a PodMonitor's or ServiceMonitor's endpoint needs to scrape a port with our certificate;
`isClient` where that port asks for one in turn. The Secret is in the monitor's namespace, where Prometheus Operator
looks for it. Renders nothing where parts speak in clear.
*/}}
{{- define "pdcoord.scrapeTls" -}}
{{- with .root.Values.auth.internalTls.secretName -}}
scheme: https
tlsConfig:
  serverName: {{ include "pdcoord.internalTlsName" $.root }}
  ca: {secret: {name: {{ . | quote }}, key: ca.crt}}
  {{- if $.isClient }}
  cert: {secret: {name: {{ . | quote }}, key: tls.crt}}
  keySecret: {name: {{ . | quote }}, key: tls.key}
  {{- end }}
{{- end }}
{{- end -}}

{{/*
Where the admin listener is beyond loopback: the place of the value that says so, with the value; else empty. There it
gets the certificate too. On loopback it is reached from inside its pod and by port-forward alone.
*/}}
{{- define "pdcoord.adminOpen" -}}
{{- $v := .Values -}}{{- $local := "^(127\\..*|::1|localhost)$" -}}{{- $found := list -}}
{{- range $name, $value := $v.coordinator.env -}}
  {{- if and (eq (upper $name) "PDCOORD_ADMIN_HOST") (not (regexMatch $local $value)) -}}
    {{- $found = append $found (printf "coordinator.env.%s is %q" $name $value) -}}
  {{- end -}}
{{- end -}}
{{- range $i, $word := $v.gateway.extproc.args -}}
  {{- $value := ternary (default "" (index $v.gateway.extproc.args (min (add $i 1) (sub (len $v.gateway.extproc.args) 1)))) (last (splitList "=" $word)) (not (contains "=" $word)) -}}
  {{- if and (regexMatch "^--?admin-host(=|$)" $word) (not (regexMatch $local $value)) -}}
    {{- $found = append $found (printf "gateway.extproc.args[%d] gives --admin-host %q" $i $value) -}}
  {{- end -}}
{{- end -}}
{{- first (append $found "") -}}
{{- end -}}

{{/*
{"root", "cluster", "protocol"}: has this chart's Envoy speak TLS to a cluster, show our certificate and verify the
other's with its name. Files are named by secrets of their own, since Envoy follows changes of those alone. Changes
the cluster and renders nothing.
*/}}
{{- define "pdcoord.envoyTls" -}}
{{- $name := include "pdcoord.internalTlsName" .root -}}
{{- $source := dict "resource_api_version" "V3" -}}
{{- $certificate := dict "name" "certificate" "sds_config" (merge (dict "path_config_source" (dict "path" "/etc/envoy/certificate.yaml")) $source) -}}
{{- $authority := dict "name" "authority" "sds_config" (merge (dict "path_config_source" (dict "path" "/etc/envoy/authority.yaml")) $source) -}}
{{- $names := list (dict "san_type" "DNS" "matcher" (dict "exact" $name)) -}}
{{- $verified := dict "default_validation_context" (dict "match_typed_subject_alt_names" $names) "validation_context_sds_secret_config" $authority -}}
{{- $common := dict
    "alpn_protocols" (list .protocol)
    "tls_params" (dict "tls_minimum_protocol_version" "TLSv1_2" "tls_maximum_protocol_version" "TLSv1_3")
    "tls_certificate_sds_secret_configs" (list $certificate)
    "combined_validation_context" $verified -}}
{{- $context := dict "@type" "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" "sni" $name "common_tls_context" $common -}}
{{- $_ := set .cluster "transport_socket" (dict "name" "envoy.transport_sockets.tls" "typed_config" $context) -}}
{{- if hasKey .cluster "health_checks" -}}
  {{- /* The picker's health port is plain text. */ -}}
  {{- $plain := dict "name" "envoy.transport_sockets.raw_buffer" "typed_config" (dict "@type" "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer") -}}
  {{- $match := (first .cluster.health_checks).transport_socket_match_criteria -}}
  {{- $_ := set .cluster "transport_socket_matches" (list (dict "name" "health" "match" $match "transport_socket" $plain)) -}}
{{- end -}}
{{- end -}}

{{/* Those secrets, as files beside Envoy's own; a Secret's volume is changed by a move in its folder. */}}
{{- define "pdcoord.envoySecrets" -}}
{{- $folder := dict "path" "/etc/pdcoord/internal-tls" -}}
{{- $type := "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret" -}}
{{- $pair := dict "certificate_chain" (dict "filename" "/etc/pdcoord/internal-tls/tls.crt") "private_key" (dict "filename" "/etc/pdcoord/internal-tls/tls.key") "watched_directory" $folder -}}
{{- $trusted := dict "trusted_ca" (dict "filename" "/etc/pdcoord/internal-tls/ca.crt") "watched_directory" $folder -}}
certificate.yaml: |
  {{- dict "resources" (list (dict "@type" $type "name" "certificate" "tls_certificate" $pair)) | toYaml | nindent 2 }}
authority.yaml: |
  {{- dict "resources" (list (dict "@type" $type "name" "authority" "validation_context" $trusted)) | toYaml | nindent 2 }}
{{- end -}}

{{/* What cannot be encrypted so is refused, lest it be in clear by oversight. Renders nothing. */}}
{{- define "pdcoord.validateTls" -}}
{{- $v := .Values -}}{{- $tls := $v.auth.internalTls -}}
{{- if and $tls.serverName (not $tls.secretName) -}}
  {{- fail (printf "auth.internalTls.serverName is %q but auth.internalTls.secretName is empty: name the Secret with the certificate that bears it, or leave the name out" $tls.serverName) -}}
{{- end -}}
{{- if $tls.secretName -}}
  {{- if eq $v.gateway.mode "attach" -}}
    {{- fail (printf "auth.internalTls.secretName is %q but gateway.mode is attach, where the Gateway's own proxies dial the servers, in clear and without a certificate of ours: set gateway.mode to envoy or embedded, or leave it out and encrypt between pods by the Gateway's mesh" $tls.secretName) -}}
  {{- end -}}
  {{- range $m, $model := $v.models -}}
    {{- range $p, $pool := $model.pools -}}
      {{- $at := printf "models[%d].pools[%d]" $m $p -}}
      {{- if and $v.pd.enabled (eq (default "vllm" $pool.engine) "sglang") (ne $pool.role "both") -}}
        {{- fail (printf "auth.internalTls.secretName is %q but %s.engine is sglang with role %s: its servers find each other over a port in clear, and a sidecar before the one that prefills passes no rendezvous on; set role both with connector none, or leave it out and encrypt between pods by the network" $tls.secretName $at $pool.role) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
